"""Differences between the supported versions of Transformers.

5.24 renames the KV cache: the argument `past_key_values` of models and layers, and the output of that name, become
`cache`. Until 5.40 models take the old name too.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

#: The newest minor version that the tests run on.
NEWEST_TESTED = (5, 24)

#: What Transformers calls, or has called, the KV cache.
CACHE_NAMES = ("cache", "past_key_values")

#: What the installed Transformers calls it, in arguments and in outputs.
CACHE_NAME = next((entry.name for entry in fields(BaseModelOutputWithPast) if entry.name in CACHE_NAMES), "cache")


@lru_cache(maxsize=1)
def warn_if_untested() -> None:
    """Warn once where the installed Transformers is newer than the newest that is tested."""
    installed = transformers.__version__
    if tuple(int(part) for part in installed.split(".")[:2]) > NEWEST_TESTED:
        tested = ".".join(map(str, NEWEST_TESTED))
        warnings.warn(
            f"pyramiddrop is tested up to Transformers {tested}; {installed} is installed. It runs, and raises where "
            f"a name that it relies on is gone: then install 'transformers=={tested}.*', or a newer pyramiddrop",
            stacklevel=4,
        )


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments that a model or a layer is called with, or None."""
    if CACHE_NAME in kwargs:
        return kwargs[CACHE_NAME]
    return next((kwargs[name] for name in CACHE_NAMES if name in kwargs), None)


def cache_argument(cache: Any) -> dict[str, Any]:
    """`cache` as the keyword argument of a model: `model(**inputs, **cache_argument(cache))`."""
    return {CACHE_NAME: cache}


def output_cache(output: Any) -> Any:
    """The KV cache in a model's output."""
    return getattr(output, CACHE_NAME)


def cache_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names under which `forward` takes a KV cache, the one that wins in front; empty where it takes none."""
    parameters = inspect.signature(forward).parameters
    own = tuple(name for name in CACHE_NAMES if name in parameters)
    return own + tuple(old for old, new in _renamed_arguments(forward) if new in own and old not in own)


def _renamed_arguments(forward: Callable[..., Any] | None) -> Iterator[tuple[str, str]]:
    """Old and new name of each argument that Transformers' `deprecate_kwarg` renames on the way to `forward`."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        names = getattr(getattr(function, "__code__", None), "co_freevars", ())
        if {"old_name", "new_name"} <= set(names):
            held: dict[str, Any] = dict(zip(names, function.__closure__ or (), strict=True))
            yield held["old_name"].cell_contents, held["new_name"].cell_contents
        forward = getattr(function, "__wrapped__", None)


def given_twice(placed: tuple[str, ...], kwargs: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Whether a call gives an argument by position and by name: the model itself will refuse it.

    Args:
        placed: names of the arguments that came by position.
        names: under which the model takes its cache.
    """
    taken = {*placed, *(names if set(names) & set(placed) else ())}
    return any(name in taken for name in kwargs)


def with_one_cache(call: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A call of a model that takes its cache under `names`; the one that it reads stands where `cache_of` finds it."""
    others = {name: value for name, value in call.items() if name not in CACHE_NAMES}
    return others | {CACHE_NAME: next((call[name] for name in names if name in call), None)}
