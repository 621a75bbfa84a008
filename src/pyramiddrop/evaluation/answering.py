"""Answer samples greedily, in left-padded batches, under any method, and record what each prefill cost."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from pyramiddrop.cost import Prompt
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.inference.answer import answer_greedily
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.prefill_stats import Usage, batch_prompts, batch_usage
from pyramiddrop.inference.prompt import build_batch
from pyramiddrop.methods import Method
from pyramiddrop.trace import Trace


@dataclass(frozen=True)
class Reply:
    """An answer, what its prefill used (by the cost model, without padding), and what it would use undropped."""

    text: str
    usage: Usage
    vanilla: Usage


class Answerer:
    """A checkpoint that answers samples. A sample's reply does not depend on those that share its batch.

    Attributes:
        batch: samples of one forward.
        max_new_tokens: the longest answer.
    """

    def __init__(self, checkpoint: Checkpoint, batch: int = 16, max_new_tokens: int = 32) -> None:
        self.checkpoint, self.batch, self.max_new_tokens = checkpoint, batch, max_new_tokens

    def answers(
        self,
        samples: Sequence[Sample],
        method: Method | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[Reply]:
        """The replies under `method` (None: the model as it is); `advance` is told the size of each batch when done.

        Raises:
            InputError: for a sample that the processor cannot take, or a picture that cannot be read.
            UnsupportedModelError, ValueError: for a model or a method that cannot work.
        """
        replies: list[Reply] = []
        for batch in self.batches(samples, method):
            replies += batch
            advance(len(batch))
        return replies

    def batches(self, samples: Sequence[Sample], method: Method | None = None) -> Generator[list[Reply]]:
        """The same batch by batch; the method is on the model from the first batch to the last."""
        with self.opened(method) as trace:
            for start in range(0, len(samples), self.batch):
                yield self._answer(self.inputs(samples[start : start + self.batch]), method, trace)

    def opened(self, method: Method | None) -> AbstractContextManager[Trace | None]:
        """The method on the model, for the time of a `with` block."""
        return method(self.checkpoint.model) if method else nullcontext()

    def inputs(self, samples: Sequence[Sample]) -> Any:
        """The tensors of one batch, on the CPU."""
        return build_batch(self.checkpoint.processor, [(list(one.images), one.question) for one in samples])

    def prompts(self, samples: Sequence[Sample]) -> list[Prompt]:
        """What each sample brings, told by the processor alone: nothing is answered."""
        starts = range(0, len(samples), self.batch)
        batches = (self.inputs(samples[start : start + self.batch]) for start in starts)
        return [prompt for inputs in batches for prompt in batch_prompts(self.checkpoint.model, inputs)]

    def _answer(self, inputs: Any, method: Method | None, trace: Trace | None) -> list[Reply]:
        texts = answer_greedily(self.checkpoint, inputs, self.max_new_tokens)
        plain = batch_usage(self.checkpoint.model, inputs)
        used = batch_usage(self.checkpoint.model, inputs, method, trace) if trace else plain
        return [Reply(*one) for one in zip(texts, used, plain, strict=True)]
