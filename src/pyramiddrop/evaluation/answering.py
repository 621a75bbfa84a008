"""Answer samples greedily, in left-padded batches, under any method, with the cost and the kept places of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image

from pyramiddrop.cost import Prompt
from pyramiddrop.evaluation.budgets import drop_layers
from pyramiddrop.evaluation.prefill_replay import PrefillReplay, first_layer_seen, replays_exactly
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.hf.model_info import inspect_model
from pyramiddrop.inference.answer import answer_greedily
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.inference.downsampling import ANY_SIZE, downsample, downsampled_usage, split_downsampling
from pyramiddrop.inference.prefill_stats import Usage, batch_prompts, batch_usage
from pyramiddrop.inference.prompt import build_batch, on_model
from pyramiddrop.methods import Compose, Downsample, Method
from pyramiddrop.report.token_layout.views import PlacedView, place_pictures
from pyramiddrop.trace import Trace


class Place(NamedTuple):
    """A place in a picture, from 0 at its upper or left edge to 1 at its lower or right one."""

    row: float
    column: float


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
    """A checkpoint that answers samples, `batch` in a forward. A reply does not depend on the others in its batch."""

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

        InputError if the processor refuses a sample, or a picture cannot be read; UnsupportedModelError or ValueError
        if the model or the method is not supported.
        """
        replies: list[Reply] = []
        with self._applied(method) as trace:
            for batch in self._batches(samples):
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
        if share is None:
            return build_batch(processor, [(list(one.images), one.question) for one in samples])
        smaller = [(downsample(processor, list(one.images), share), one.question) for one in samples]
        return build_batch(processor, smaller, ANY_SIZE)

    def prompts(self, samples: Sequence[Sample]) -> list[Prompt]:
        """The token counts of each sample, from the processor alone."""
        batches = map(self.inputs, self._batches(samples))
        return [prompt for inputs in batches for prompt in batch_prompts(self.checkpoint.model, inputs)]

    def _batches(self, samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
        return (samples[start : start + self.batch] for start in range(0, len(samples), self.batch))

    def _views(self, samples: Sequence[Sample], inputs: Any) -> list[Sequence[PlacedView]]:
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
        if sum(start is not None for start in starts) + vanilla < 2:
            return None
        if self._exact is None:  # tried once, on one sample with one of the methods
            layer, one = max(shared), on_model(model, self.inputs([sample]))
            self._exact = replays_exactly(self.checkpoint, one, shared[layer], layer, self.max_new_tokens)
        if not self._exact:
            return None
        replay = PrefillReplay(inspect_model(model), shared)
        if not vanilla:
            with replay.recorded():
                answer_greedily(self.checkpoint, inputs, max_new_tokens=1)
        return replay


def mean_place(views: Sequence[PlacedView], tokens: Iterable[int]) -> Place | None:
    """The mean place of `tokens` (counted from 0 through all `views` of a prompt), each at the middle of its cell.

    None if none of them has a place.
    """
    located = [(seen, cell) for seen in views for cell in seen.view.cells]
    places = []
    for seen, cell in (located[token] for token in tokens):
        if cell is not None:
            box, view, picture = seen.view.box, seen.view, seen.picture
            down = box.top + (cell[0] + 0.5) / view.rows * box.height
            across = box.left + (cell[1] + 0.5) / view.columns * box.width
            places.append((down / picture.height, across / picture.width))
    return Place(*(sum(axis) / len(places) for axis in zip(*places, strict=True))) if places else None


def batch_views(
    config: Any, processor: Any, pictures: Sequence[Sequence[Image.Image]], inputs: Mapping[str, Any]
) -> list[Sequence[PlacedView]]:
    """The views of each prompt of a batch, given its pictures and the processor's outputs for the batch.

    None for prompts whose visual tokens have no known place.
    """
    total, start, found = sum(map(len, pictures)), 0, list[Sequence[PlacedView]]()
    rows = {name: value for name, value in inputs.items() if len(value) == total}
    for own in pictures:
        part = {name: value[start : start + len(own)] for name, value in rows.items()}
        try:
            found.append(place_pictures(config, processor, own, part))
        except ValueError:  # CannotPlaceError among them
            found.append(())
        start += len(own)
    return found


def kept_places(trace: Trace, method: Method | None, views: Sequence[Sequence[PlacedView]]) -> list[Place | None]:
    """For each prompt, the mean place of the tokens that its last drop (before an early exit) kept.

    None for tokens without a known place, and for downsampling, whose tokens are different ones.
    """
    parts = method.parts if isinstance(method, Compose) else (method,)
    if any(isinstance(part, Downsample) for part in parts) or not trace.stages:
        return [None] * len(views)
    kept = [stage.kept for stage in trace.stages]
    found: list[Place | None] = []
    for sample, (columns, own) in enumerate(zip(trace.visual_columns, views, strict=True)):
        last = next((one[sample] for one in reversed(kept) if len(one[sample])), columns)
        known = sum(seen.view.tokens for seen in own) == len(columns)
        found.append(mean_place(own, torch.searchsorted(columns, last).tolist()) if known else None)
    return found
