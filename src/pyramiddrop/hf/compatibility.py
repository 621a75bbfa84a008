"""Check that Transformers and trainers use the names that dropping relies on, so that a rename is an error.

Signatures are checked when a method is applied, and calls in prefills that drop, without waiting for the device. What a
model does not allow (layers, `per_image`, positions) is refused in `model_info`.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from traceback import walk_stack
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache

from pyramiddrop.hf.model_info import ModelInfo, UnsupportedModelError
from pyramiddrop.hf.plan import Rules
from pyramiddrop.hf.versions import CACHE_NAMES, cache_of

_POSITIONS = ("position_embeddings", "position_ids")
_FOLLOWED = ("attention_mask", *_POSITIONS)

_MODEL = (("input_ids",), ("inputs_embeds",), ("attention_mask",), ("labels",))
_TEXT = (("inputs_embeds",), ("attention_mask",), ("position_ids",), CACHE_NAMES)
_LAYER = (("attention_mask",), _POSITIONS, CACHE_NAMES)

#: The number of the last prefill that was opened in this thread.
_last_run: ContextVar[int] = ContextVar("pyramiddrop_last_run", default=0)


# ---- when a method is applied ------------------------------------------------------------------------------------


def check_signatures(info: ModelInfo) -> None:
    """Raise UnsupportedModelError if a forward lacks an argument that dropping needs."""
    # A user's subclass may name fewer arguments than the Transformers model that it calls.
    bases: tuple[Any, ...] = type(info.generator).__mro__ if info.generator is not info.text else ()
    for kind in [kind for kind in bases if kind.__module__.startswith("transformers.models.")][:1]:
        _check_names(kind.__name__, kind.forward, _MODEL)
    _check_names(type(info.text).__name__, info.text.forward, _TEXT)
    for layer in {type(layer): layer for layer in info.layers}.values():
        _check_names(type(layer).__name__, layer.forward, _LAYER)


def _check_names(name: str, forward: Any, needed: Sequence[tuple[str, ...]]) -> None:
    # A forward without any named argument wraps another one and is accepted.
    parameters = inspect.signature(forward).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {parameter.name for parameter in parameters if parameter.kind not in variable} - {"self"}
    missing = [_either(names) for names in needed if not named & set(names)]
    if named and missing:
        raise _lost(f"{name}.forward has no argument {missing[0]}")


# ---- in a prefill that drops -------------------------------------------------------------------------------------


def check_cache(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError if a module receives a KV cache under an unknown name."""
    unknown = [name for name, value in kwargs.items() if isinstance(value, Cache) and name not in CACHE_NAMES]
    if unknown:
        raise _lost(f"{type(module).__name__} is given its KV cache as {unknown[0]!r}, not as {_either(CACHE_NAMES)}")


def check_per_token(layer: nn.Module, kwargs: Mapping[str, Any], length: int) -> None:
    """Raise UnsupportedModelError if a layer receives per-token tables of `length` tokens under an unknown name.

    These are sequences of tensors (B or 1, length, ...), such as cosines and sines.
    """
    several = {name: value for name, value in kwargs.items() if isinstance(value, tuple | list) and len(value)}
    unknown = [
        name
        for name, tables in several.items()
        if name not in _FOLLOWED and all(isinstance(one, Tensor) and length in one.shape[1:2] for one in tables)
    ]
    if unknown:
        raise _lost(
            f"{type(layer).__name__} is given {unknown[0]!r}, tensors of all {length} tokens, and only "
            f"{_either(_FOLLOWED)} can be shortened"
        )


@contextmanager
def cache_unwritten(layer: nn.Module, index: int, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Raise UnsupportedModelError if the block, in which layer `index` ranks, writes to the KV cache in `kwargs`."""
    cache = cache_of(kwargs)
    before = _state(cache, index)
    try:
        yield
    finally:  # also if the write made the ranking fail
        if _state(cache, index) != before:
            raise _lost(f"ranking by {type(layer).__name__} {index} wrote to the KV cache, which it is not given")


def _state(cache: Any, index: int) -> tuple[Any, ...]:
    """A value that changes if layer `index` of a cache is written to; it needs no wait for the device."""
    layers = getattr(cache, "layers", ())
    keys = getattr(layers[index], "keys", None) if index < len(layers) else None
    if not isinstance(keys, Tensor):
        return len(layers), keys
    return len(layers), id(keys), keys.shape, None if keys.is_inference() else keys._version


def check_drops(text: nn.Module, missed: Sequence[int]) -> None:
    """Raise UnsupportedModelError if a text model ran the `missed` layers without the drops before them."""
    if missed:
        raise _lost(
            f"{type(text).__name__} ran without the drop before layer {missed[0]}: it does not pass its keyword "
            "arguments on to its layers, or calls their `forward` past their hooks"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def number_run() -> int:
    """A new number for a prefill that is opened now."""
    _last_run.set(_last_run.get() + 1)
    return _last_run.get()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_reached(module: nn.Module, text: nn.Module, number: int) -> None:
    """Raise UnsupportedModelError if the prefill with this number did not reach the text model's hooks.

    A prefill that a module further in has opened instead is accepted.
    """
    if _last_run.get() == number:
        raise _lost(
            f"{type(module).__name__} did not pass its keyword arguments on to {type(text).__name__}, or called its "
            "`forward` past its hooks"
        )


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def _lost(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what}. Transformers {transformers.__version__} is not supported for this model: use another version, or "
        "pyramiddrop's newest. In a class of your own, take the arguments by Transformers' names, and pass keyword "
        "arguments on"
    )


# ---- in a trainer ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class TrainerCheck:
    """A forward pre-hook that checks, once, a `Trainer` with a reference model (TRL's DPO, KTO, GRPO and RLOO).

    Trainers do not tell their models about each other, and so the trainer is searched on the call stack. Forwards with
    a cache, which are those of `generate`, are skipped. `attachment_of` gives the attachment of another model, or None.
    """

    rules: Rules
    attachment_of: Callable[[nn.Module], Any]
    _done: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the trainer of this forward."""
        if torch.compiler.is_compiling() or self._done or cache_of(kwargs) is not None:
            return
        trainer = calling_trainer()
        self._done = trainer is not None or module.training
        if trainer is None:
            return
        name = type(trainer).__name__
        if self.rules.logits == "kept":
            raise ValueError(
                f'logits="kept" is not supported under {name}, which reads the logits of all columns; use logits="full"'
            )
        if trainer.ref_model is None:
            return
        found = self.attachment_of(trainer.ref_model)
        if found is None or replace(found.rules, ranking_flops=self.rules.ranking_flops) != self.rules:
            warnings.warn(
                f"the reference model of {name} does not drop visual tokens as the trained model does, and the two are "
                "compared as if it did. Before training: pyramiddrop.apply(trainer.ref_model, method)",
                stacklevel=2,
            )


def calling_trainer() -> Any:
    """The innermost `Trainer` with a `ref_model` on the call stack, or None; such a trainer reads all logits."""
    for frame, _ in walk_stack(sys._getframe(1)):
        owner = frame.f_locals.get("self")
        if hasattr(type(owner), "compute_loss") and hasattr(owner, "ref_model"):
            return owner
    return None
