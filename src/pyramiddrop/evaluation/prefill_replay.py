"""Record a prefill once and replay its first layers, which do not depend on later drops."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import wraps
from typing import Any

import torch
from torch import nn

from pyramiddrop.evaluation.agreement import generate_with_logits
from pyramiddrop.hf.model_info import ModelInfo, inspect_model
from pyramiddrop.hf.versions import cache_of
from pyramiddrop.inference.checkpoint import Checkpoint
from pyramiddrop.methods import Method

_FEATURES = "get_image_features"

Forward = Callable[..., Any]


class PrefillReplay:
    """The state after the first layers of one unpatched prefill, for prefills of the same call that drop tokens later.

    >>> replay = PrefillReplay(inspect_model(model), layers=[8, 16])
    >>> with replay.recorded():
    ...     model.generate(**inputs)
    >>> with PyramidDrop(layers=[16], keep=[0.5])(model), replay.replayed(16):
    ...     model.generate(**inputs)                    # layers 0..15 and the vision tower do not run again

    The numbers equal those of a whole prefill to the bit, because hidden states and caches are copied. A method must
    not change anything before the end of the replayed layers (by an earlier drop or `rank_layer="last"`).

    Args:
        info: the parts of the model.
        layers: 0-based layers before which prefills will drop; the input of each is held in memory.
    """

    def __init__(self, info: ModelInfo, layers: Collection[int]) -> None:
        self._layers = info.layers
        self._ends = {layer - 1 for layer in layers}
        self._sees = next((module for module in reversed(info.wrappers) if hasattr(type(module), _FEATURES)), None)
        self._outputs: dict[int, Any] = {}
        self._caches: dict[int, Any] = {}
        self._features: list[Any] = []

    @staticmethod
    def can_share(info: ModelInfo) -> bool:
        """True if a layer depends only on its input and the cache; False for models whose layers share keys."""
        return info.sources == tuple(range(len(info.layers)))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the first prefill in the block, which must not drop tokens."""
        with self._standing_in(max(self._ends) + 1, self._recording, self._seeing):
            yield

    @contextmanager
    def replayed(self, layer: int) -> Iterator[None]:
        """Start the next prefill at `layer`, with its recorded input. Enter it after the method."""

        def replaying(index: int, forward: Forward) -> Forward:
            return self._replaying(index, layer - 1, forward)

        with self._standing_in(layer, replaying, self._seen):
            yield

    def _standing_in(
        self, count: int, layers: Callable[[int, Forward], Forward], features: Callable[[Forward], Forward]
    ) -> AbstractContextManager[None]:
        """Replacements of the forwards of the first `count` layers and of the picture encoder."""
        others: dict[tuple[nn.Module, str], Forward] = {
            (layer, "forward"): layers(index, layer.forward) for index, layer in enumerate(self._layers[:count])
        }
        if self._sees is not None:
            others[self._sees, _FEATURES] = features(getattr(self._sees, _FEATURES))
        return _replaced(others)

    def _recording(self, index: int, forward: Forward) -> Forward:
        @_once(forward)
        def record(*args: Any, **kwargs: Any) -> Any:
            output, cache = forward(*args, **kwargs), cache_of(kwargs)
            if cache is not None:
                self._caches[index] = deepcopy(cache.layers[index])
            if index in self._ends:
                self._outputs[index] = deepcopy(output)
            return output

        return record

    def _replaying(self, index: int, last: int, forward: Forward) -> Forward:
        @_once(forward)
        def replay(*args: Any, **kwargs: Any) -> Any:
            cache = cache_of(kwargs)
            if cache is not None:
                cache.layers[index] = deepcopy(self._caches[index])
            return deepcopy(self._outputs[last])  # only the shape matters to the layers in between

        return replay

    def _seeing(self, forward: Forward) -> Forward:
        @_once(forward)
        def see(*args: Any, **kwargs: Any) -> Any:
            self._features.append(forward(*args, **kwargs))
            return deepcopy(self._features[0])

        return see

    def _seen(self, forward: Forward) -> Forward:
        return _once(forward)(lambda *args, **kwargs: deepcopy(self._features[0])) if self._features else forward


def first_layer_seen(method: Method, layers: Sequence[int]) -> int | None:
    """The first layer whose input `method` ranks or changes; all layers before it run as in the unpatched model.

    Args:
        layers: the layers before which the method drops.

    Returns:
        A 0-based layer; None if the method drops before the decoder, or its scorer reads an earlier layer.
    """
    if layers[0] == 0 or method.scorer().needs_previous_hidden:
        return None
    return layers[0] - (method.rank_layer == "last")


def replays_exactly(
    checkpoint: Checkpoint, inputs: Mapping[str, Any], method: Method, layer: int, max_new_tokens: int
) -> bool:
    """True if `method` answers `inputs` bit-identically when its prefill is replayed up to `layer`."""
    model = checkpoint.model
    if not PrefillReplay.can_share(inspect_model(model)):
        return False
    replay = PrefillReplay(inspect_model(model), [layer])
    with replay.recorded():
        generate_with_logits(checkpoint, inputs, max_new_tokens)
    with method(model):
        whole = generate_with_logits(checkpoint, inputs, max_new_tokens)
    with method(model), replay.replayed(layer):
        short = generate_with_logits(checkpoint, inputs, max_new_tokens)
    return torch.equal(whole.logits, short.logits) and whole.texts == short.texts


def _once(forward: Forward) -> Callable[[Forward], Forward]:
    """Decorator of a replacement for the first call of `forward`; later calls (decode steps) run the original."""

    def decorate(stand_in: Forward) -> Forward:
        called = False

        @wraps(forward)
        def first(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            if called:
                return forward(*args, **kwargs)
            called = True
            return stand_in(*args, **kwargs)

        return first

    return decorate


@contextmanager
def _replaced(others: Mapping[tuple[nn.Module, str], Forward]) -> Iterator[None]:
    """Replace methods of these module objects within the block."""
    held = {key: key[0].__dict__.get(key[1]) for key in others}
    try:
        for (module, name), other in others.items():
            module.__dict__[name] = other
        yield
    finally:
        for (module, name), own in held.items():
            if own is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = own
