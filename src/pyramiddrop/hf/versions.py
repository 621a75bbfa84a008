"""Differences between the supported versions of Transformers.

5.24 renames the KV cache: the argument and the output `past_key_values` become `cache`; models accept the old name
until 5.40. Before 5.18, a cache can be cropped to a length, and before 5.15 `generate` does so; later versions give the
number of columns to remove.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cache as memoized
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

#: The newest minor version that the tests run on.
NEWEST_TESTED = (5, 24)

#: All names of the KV cache in Transformers, present and past.
CACHE_NAMES = ("cache", "past_key_values")

#: Its name in the installed Transformers, in arguments and in outputs.
CACHE_NAME = next((entry.name for entry in fields(BaseModelOutputWithPast) if entry.name in CACHE_NAMES), "cache")


def _installed() -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


@memoized
def warn_if_untested() -> None:
    """Warn once if the installed Transformers is newer than the newest tested one."""
    if _installed() > NEWEST_TESTED:
        installed = transformers.__version__
        tested = ".".join(map(str, NEWEST_TESTED))
        warnings.warn(
            f"pyramiddrop is tested up to Transformers {tested}; {installed} is installed. It runs, and raises where "
            f"a name that it relies on is gone: then install 'transformers=={tested}.*', or a newer pyramiddrop",
            stacklevel=4,
        )


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a model or a layer, or None."""
    if CACHE_NAME in kwargs:
        return kwargs[CACHE_NAME]
    return next((kwargs[name] for name in CACHE_NAMES if name in kwargs), None)


def ignores_cache(layer: Any) -> bool:
    """True if gradient checkpointing keeps a decoder layer from the KV cache that it is given."""
    checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()
    return bool(checkpointed) and not getattr(layer, "_can_checkpoint_with_cache", False)


def cache_argument(cache: Any) -> dict[str, Any]:
    """`cache` as the keyword argument of a model: `model(**inputs, **cache_argument(cache))`."""
    return {CACHE_NAME: cache}


def output_cache(output: Any) -> Any:
    """The KV cache in a model's output."""
    return getattr(output, CACHE_NAME)


def let_crop_follow(cache: Any, dropped: Mapping[int, int]) -> None:
    """Make `crop(length)` of a pruned cache, if Transformers has it, crop each layer after the same token.

    Transformers itself crops each layer to `length` slots, but a pruned layer lacks as many columns as `dropped` tells.
    """
    if _installed() >= (5, 18) or cache.is_compileable:
        return
    if not hasattr(cache, _DROPPED):
        base: type = type(cache)
        cache.__class__ = _cropped_by_columns(base)
    setattr(cache, _DROPPED, dict(dropped))


_DROPPED = "pyramiddrop_dropped"


@memoized
def _cropped_by_columns(base: type) -> Any:
    """A subclass of the cache class `base` whose `crop` takes a length in columns of the full sequence."""

    class PrunedCache(base):  # type: ignore[misc]
        def crop(self, length: int) -> None:
            for index, layer in enumerate(self.layers):
                layer.crop(length - getattr(self, _DROPPED).get(index, 0) if length > 0 else length)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return empty_object, (_cropped_by_columns, base), self.__dict__

    PrunedCache.__name__ = base.__name__
    return PrunedCache


def empty_object(subclass: Callable[[type], type], base: type) -> Any:
    """An object without attributes of a `subclass` that is made when needed, for copying and unpickling."""
    return object.__new__(subclass(base))


def cache_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names under which `forward` takes a KV cache, the one with precedence first; empty if it takes none."""
    parameters = inspect.signature(forward).parameters
    own = tuple(name for name in CACHE_NAMES if name in parameters)
    return own + tuple(old for old, new in _renamed_arguments(forward) if new in own and old not in own)


def _renamed_arguments(forward: Callable[..., Any] | None) -> Iterator[tuple[str, str]]:
    """The old and new names of arguments that Transformers' `deprecate_kwarg` renames in `forward`."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        names = getattr(getattr(function, "__code__", None), "co_freevars", ())
        if {"old_name", "new_name"} <= set(names):
            held: dict[str, Any] = dict(zip(names, function.__closure__ or (), strict=True))
            yield held["old_name"].cell_contents, held["new_name"].cell_contents
        forward = getattr(function, "__wrapped__", None)


def given_twice(placed: tuple[str, ...], kwargs: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """True if a call gives an argument both by position (`placed`) and by name, which the model itself will refuse.

    The cache may have several `names`.
    """
    return not kwargs.keys().isdisjoint((*placed, *(names if set(names) & set(placed) else ())))


def with_one_cache(call: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Move the cache that a model takes under `names` to the name at which `cache_of` finds it."""
    others = {name: value for name, value in call.items() if name not in CACHE_NAMES}
    return others | {CACHE_NAME: next((call[name] for name in names if name in call), None)}
