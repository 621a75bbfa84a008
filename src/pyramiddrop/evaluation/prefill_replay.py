"""Record a prefill once and replay its first layers, which do not depend on later drops."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from pyramiddrop.hf.model_info import ModelInfo, inspect_model
from pyramiddrop.hf.versions import cache_of
from pyramiddrop.inference.answer import answer_greedily
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

    def recorded(self) -> AbstractContextManager[None]:
        """Record the first prefill in the block, which must not drop tokens."""
        return self._standing_in(max(self._ends) + 1, self._record, self._see)

    def replayed(self, layer: int) -> AbstractContextManager[None]:
        """Start the next prefill at `layer`, with its recorded input. Enter it after the method."""
        return self._standing_in(layer, partial(self._replay, layer - 1), self._seen if self._features else None)

    @contextmanager
    def _standing_in(self, count: int, layer: Forward, features: Forward | None) -> Iterator[None]:
        """Run stand-ins for the first calls of the first `count` layers and of the picture encoder.

        Args:
            layer: called with the layer's number, its forward, and the arguments of the call.
            features: called with the encoder and the arguments of the call; None: the encoder runs.
        """
        others: dict[tuple[Any, str], Forward] = {
            (module, "forward"): partial(layer, index) for index, module in enumerate(self._layers[:count])
        }
        if self._sees is not None and features is not None:
            others[self._sees, _FEATURES] = features
        held = {key: key[0].__dict__.get(key[1]) for key in others}
        try:
            for (module, name), stand_in in others.items():
                module.__dict__[name] = _first_call(getattr(module, name), stand_in)
            yield
        finally:
            for (module, name), own in held.items():
                if own is None:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = own

    def _record(self, index: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output, cache = forward(*args, **kwargs), cache_of(kwargs)
        if cache is not None:
            self._caches[index] = deepcopy(cache.layers[index])
        if index in self._ends:
            self._outputs[index] = deepcopy(output)
        return output

    def _replay(self, last: int, index: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        cache = cache_of(kwargs)
        if cache is not None:
            cache.layers[index] = deepcopy(self._caches[index])
        return deepcopy(self._outputs[last])  # only the shape matters to the layers in between

    def _see(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        self._features.append(forward(*args, **kwargs))
        return self._seen()

    def _seen(self, *args: Any, **kwargs: Any) -> Any:
        return deepcopy(self._features[0])


def _first_call(forward: Forward, stand_in: Forward) -> Forward:
    """`stand_in`, given `forward` and its arguments, for the first call; later ones (decode steps) run `forward`."""
    called = False

    @wraps(forward)
    def first(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        if called:
            return forward(*args, **kwargs)
        called = True
        return stand_in(forward, *args, **kwargs)

    return first


def first_layer_seen(method: Method, layers: Sequence[int]) -> int | None:
    """The 0-based first layer whose input `method` ranks or changes, if it drops before `layers`.

    All layers before it run as in the unpatched model. None if the method drops before the decoder, or its scorer reads
    an earlier layer.
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
        whole, logits = generate_with_logits(checkpoint, inputs, max_new_tokens)
    with method(model), replay.replayed(layer):
        short, same_logits = generate_with_logits(checkpoint, inputs, max_new_tokens)
    return torch.equal(logits, same_logits) and whole == short


def generate_with_logits(
    checkpoint: Checkpoint, inputs: Mapping[str, Any], max_new_tokens: int
) -> tuple[list[str], Tensor]:
    """Answer a batch of left-padded prompts under the method that is applied to the model, if any.

    Returns:
        The answers, and the logits (B, V) of their first tokens, float32.
    """
    found: list[Tensor] = []

    def keep_first(module: Any, args: Any, output: Any) -> None:
        if not found:
            found.append(output.logits[:, -1].float())

    handle = checkpoint.model.register_forward_hook(keep_first)
    try:
        return answer_greedily(checkpoint, inputs, max_new_tokens), found[0]
    finally:
        handle.remove()
