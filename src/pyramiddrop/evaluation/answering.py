"""Answer samples greedily, in left-padded batches, under any method, and record what each prefill cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from pyramiddrop.cost import Prompt
from pyramiddrop.evaluation.budgets import drop_layers
from pyramiddrop.evaluation.kept_places import Place, batch_views, kept_places
from pyramiddrop.evaluation.prefill_replay import PrefillReplay, first_layer_seen, replays_exactly
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.hf.model_info import inspect_model
from pyramiddrop.inference.answer import answer_greedily
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.downsampling import ANY_SIZE, downsample, downsampled_usage, split_downsampling
from pyramiddrop.inference.prefill_stats import Usage, batch_prompts, batch_usage
from pyramiddrop.inference.prompt import build_batch, on_model
from pyramiddrop.methods import Method
from pyramiddrop.report.token_layout.views import PlacedView
from pyramiddrop.trace import Trace


@dataclass(frozen=True)
class Reply:
    """An answer, with the usage of its prefill (by the cost model, without padding) and that without dropping.

    `place` is the mean place of the kept tokens, if it is known: see `kept_places`.
    """

    text: str
    usage: Usage
    vanilla: Usage
    place: Place | None = None


class Answerer:
    """A checkpoint that answers samples. A sample's reply does not depend on the others in its batch.

    Attributes:
        batch: number of samples in a forward.
        max_new_tokens: length of the longest answer.
    """

    def __init__(self, checkpoint: Checkpoint, batch: int = 16, max_new_tokens: int = 32) -> None:
        self.checkpoint, self.batch, self.max_new_tokens = checkpoint, batch, max_new_tokens
        self._exact: bool | None = None

    def answers(
        self,
        samples: Sequence[Sample],
        method: Method | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[Reply]:
        """The replies under `method` (None: vanilla); `advance` is called with the size of each finished batch.

        Raises:
            InputError: if the processor refuses a sample, or a picture cannot be read.
            UnsupportedModelError, ValueError: if the model or the method is not supported.
        """
        replies: list[Reply] = []
        with self._applied(method) as trace:
            for start in range(0, len(samples), self.batch):
                batch = samples[start : start + self.batch]
                inputs = self.inputs(batch)
                views = self._views(batch, inputs) if method else ()
                replies += self._answer(batch, inputs, method, trace, views)
                advance(len(batch))
        return replies

    def answers_by_method(self, samples: Sequence[Sample], methods: Sequence[Method | None]) -> Iterator[list[Reply]]:
        """The replies to one batch under each of `methods` in turn, bit-identical to those of `answers`.

        If possible, the vision tower and the layers before a method's first drop run once for all methods.
        """
        inputs = on_model(self.checkpoint.model, self.inputs(samples))
        starts = [None if one is None else first_layer_seen(one, drop_layers(self.checkpoint, one)) for one in methods]
        views = self._views(samples, inputs) if any(methods) else ()
        replay = self._shared_prefill(samples[0], inputs, methods, starts)
        for method, start in zip(methods, starts, strict=True):
            if replay is None or (method is not None and start is None):
                shared: AbstractContextManager[None] = nullcontext()
            else:
                shared = replay.recorded() if start is None else replay.replayed(start)
            with self._applied(method) as trace, shared:
                replies = self._answer(samples, inputs, method, trace, views)
            yield replies

    def split(self, method: Method | None) -> tuple[float | None, Method | None]:
        """The share of visual tokens of downsampled pictures (None: original pictures), and the method in the model."""
        return split_downsampling(method, self.checkpoint.processor)

    def _applied(self, method: Method | None) -> AbstractContextManager[Trace | None]:
        _, inside = self.split(method)
        return inside(self.checkpoint.model) if inside else nullcontext()

    def inputs(self, samples: Sequence[Sample], share: float | None = None) -> Any:
        """The tensors of one batch, on the CPU; a `share` downsamples pictures to at most that share of tokens."""
        processor = self.checkpoint.processor
        questions = [(list(one.images), one.question) for one in samples]
        if share is None:
            return build_batch(processor, questions)
        smaller = [(downsample(processor, images, share), question) for images, question in questions]
        return build_batch(processor, smaller, ANY_SIZE)

    def prompts(self, samples: Sequence[Sample]) -> list[Prompt]:
        """The token counts of each sample, from the processor alone."""
        starts = range(0, len(samples), self.batch)
        batches = (self.inputs(samples[start : start + self.batch]) for start in starts)
        return [prompt for inputs in batches for prompt in batch_prompts(self.checkpoint.model, inputs)]

    def _views(self, samples: Sequence[Sample], inputs: Any) -> list[Sequence[PlacedView]]:
        """The views of each sample's pictures, which place its visual tokens."""
        config = self.checkpoint.model.config
        return batch_views(config, self.checkpoint.processor, [list(one.images) for one in samples], inputs)

    def _answer(
        self,
        samples: Sequence[Sample],
        inputs: Any,
        method: Method | None,
        trace: Trace | None,
        views: Sequence[Sequence[PlacedView]],
    ) -> list[Reply]:
        """The replies to `samples` with tensors `inputs`, under the part of `method` in the model."""
        share, inside = self.split(method)
        given = inputs if share is None else self.inputs(samples, share)
        texts = answer_greedily(self.checkpoint, given, self.max_new_tokens)
        plain = batch_usage(self.checkpoint.model, inputs)
        used = batch_usage(self.checkpoint.model, given, inside, trace) if inside or share else plain
        if share is not None:
            used = list(map(downsampled_usage, used, plain))
        places = kept_places(trace, method, views) if trace else [None] * len(texts)
        return [Reply(*one) for one in zip(texts, used, plain, places, strict=True)]

    def _shared_prefill(
        self, sample: Sample, inputs: Any, methods: Sequence[Method | None], starts: Sequence[int | None]
    ) -> PrefillReplay | None:
        """The recorded vanilla prefill of `inputs`; None if replaying it saves nothing or changes numbers.

        It is still empty if the first of `methods` is vanilla, whose prefill is then recorded.
        """
        model, vanilla = self.checkpoint.model, methods[0] is None
        shared = {start: method for method, start in zip(methods, starts, strict=True) if start is not None and method}
        if sum(start is not None for start in starts) + vanilla < 2 or not self._replays(sample, shared):
            return None
        replay = PrefillReplay(inspect_model(model), shared)
        if not vanilla:
            with replay.recorded():
                answer_greedily(self.checkpoint, inputs, max_new_tokens=1)
        return replay

    def _replays(self, sample: Sample, methods: Mapping[int, Method]) -> bool:
        """True if replayed prefills are exact in this model, tried once on one sample with one of `methods`."""
        if self._exact is None:
            layer = max(methods)
            inputs = on_model(self.checkpoint.model, self.inputs([sample]))
            self._exact = replays_exactly(self.checkpoint, inputs, methods[layer], layer, self.max_new_tokens)
        return self._exact
