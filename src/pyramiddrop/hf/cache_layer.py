"""A KV cache layer that carries what is remembered of a pruned prompt, so that this follows the rows of its keys.

Whoever reorders, picks or repeats the rows of a cache calls a method of each of its layers. The first layer of a pruned
cache gets a class of its own, derived from the one it has: the memory travels with it through copies, pickles and other
cache objects on the same layers, and no method of Transformers is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as memoized
from typing import Any

import torch
from torch import Tensor

_MEMORY = "pyramiddrop_memory"


class RowMemory:
    """What is remembered of a batch of prompts in a KV cache, one row a sample.

    Attributes:
        called: whether a model with a method on it has opened a forward with this cache that has added no keys yet.
    """

    called = False

    def select(self, pick: Callable[[Tensor], Tensor]) -> RowMemory:
        """The same of the rows that `pick` takes of each (B, ...) tensor."""
        raise NotImplementedError


@memoized
def _carrying(base: type) -> Any:
    """The class of a cache layer that carries a memory, made of the class that the layer has."""

    class CarryingLayer(base):  # type: ignore[misc]
        _layer_type = None  # Transformers registers subclasses that have one

        def update(self, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                _check_called(getattr(self, _MEMORY))
            return super().update(*args, **kwargs)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._follow(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

        def batch_select_indices(self, indices: Any) -> None:
            super().batch_select_indices(indices)
            self._follow(lambda rows: rows[indices.to(rows.device) if isinstance(indices, Tensor) else indices])

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._follow(lambda rows: rows.repeat_interleave(repeats, 0))

        def _follow(self, pick: Callable[[Tensor], Tensor]) -> None:
            setattr(self, _MEMORY, getattr(self, _MEMORY).select(pick))

        def reset(self) -> None:
            super().reset()
            _release(self)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _blank, (base,), self.__dict__

    CarryingLayer.__name__ = base.__name__
    return CarryingLayer


def _check_called(memory: RowMemory) -> None:
    """Raise ValueError where keys come from a model that has no method on it; a compiled one is not seen."""
    if not memory.called:
        raise ValueError(
            "this KV cache holds a prompt of which a pyramiddrop method dropped tokens, but the model that is called "
            "with it has no method on it. Call it inside the `with` block (or after `apply`), on the model or view "
            "that has the method, or start again without this cache"
        )
    memory.called = False


def _blank(base: type) -> Any:
    """An empty layer that is to carry a memory, for copies and pickles to fill."""
    return object.__new__(_carrying(base))


def _release(layer: Any) -> None:
    if hasattr(layer, _MEMORY):
        delattr(layer, _MEMORY)
        layer.__class__ = type(layer).__base__


def _first(cache: Any) -> Any:
    """The first layer of a cache that counts tokens, or None."""
    return next((layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")), None)


def memory_of(cache: Any) -> Any:
    """What is remembered of a cache, or None."""
    return getattr(_first(cache), _MEMORY, None)


def remember(cache: Any, memory: RowMemory) -> None:
    """Put a memory on a cache that has been filled."""
    layer = _first(cache)
    if not hasattr(layer, _MEMORY):
        base: type = type(layer)
        layer.__class__ = _carrying(base)
    setattr(layer, _MEMORY, memory)


def forget(cache: Any) -> None:
    """Take its memory off a cache, where it has one."""
    _release(_first(cache))
