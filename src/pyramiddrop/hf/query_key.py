"""Queries and keys of a decoder layer, taken from the layer itself just before its attention kernel.

The layer's own forward runs on a shadow copy of it, whose attention implementation stops everything as soon as it is
called. So the answer is exact whatever the family does before: norms of queries and keys, rotary embeddings of any
layout or none, latent attention, gates, several branches. Modules are called, never their `.weight`: LoRA, quantised,
sharded and offloaded weights work.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from pyramiddrop.hf.rows import take_hidden, take_rows

_STOP = "pyramiddrop_stop"
_HOOK = "_hf_hook"  # where accelerate keeps a module's hook, which it runs from the instance's own `forward`
_QUERIES, _VALUES = ("q_proj", "q_b_proj"), ("v_proj",)  # projections that the keys do not depend on


@dataclass(frozen=True)
class QueryKey:
    """What the attention kernel of a layer is given.

    Attributes:
        queries: (B, H, Q, d), rotated, of the asking rows.
        keys: (B, Hkv, N, d), rotated, of all rows.
        scale: of the dot products.
        softcap: cap of the logits, or None.
        sinks: (H,) logits that take part in the softmax beside the keys', or None.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None


class NoAttentionError(RuntimeError):
    """A layer never reached Transformers' attention interface."""


class _ReachedError(Exception):
    def __init__(self, queries: Tensor, keys: Tensor, scaling: float | None, options: Mapping[str, Any]) -> None:
        self.queries, self.keys = queries, keys
        self.scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
        self.softcap, self.sinks = options.get("softcap"), options.get("s_aux")


def _stop(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> NoReturn:
    """Take what Transformers' `sdpa_attention_forward` takes, by position too: other libraries wrap every function of
    the attention interface and call it so (kvpress)."""
    raise _ReachedError(query, key, scaling, options)


AttentionInterface.register(_STOP, _stop)

PerToken = Callable[[Tensor | None], dict[str, Any]]


class QueryKeyExtractor:
    """Projects for one model; remembers of which layers the keys may be had alone."""

    def __init__(self) -> None:
        self._splits: dict[int, bool] = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def project(self, index: int, layer: nn.Module, hidden: Tensor, asking: Tensor, arguments: PerToken) -> QueryKey:
        """Queries of the rows `asking` (B, Q) and keys of all rows of `hidden` (B, N, D), in layer `index`.

        Args:
            arguments: rows (B, n) of `hidden`, or None for all -> what the layer is called with beside them.

        Raises:
            NoAttentionError: where the layer does not reach the attention interface.
        """
        if self._splits.get(index, True):
            asked = _run(shadow_copy(layer), take_hidden(hidden, asking), arguments(asking))
            keyed = _run(shadow_copy(layer, (*_QUERIES, *_VALUES)), hidden, arguments(None))
            if index not in self._splits:  # once, for the answer makes the host wait for the device
                self._splits[index] = _agree(keyed.keys, asked.keys, asking)
            if self._splits[index]:
                return QueryKey(asked.queries, keyed.keys, asked.scale, asked.softcap, asked.sinks)
        whole = _run(shadow_copy(layer), hidden, arguments(None))
        return QueryKey(_columns(whole.queries, asking), whole.keys, whole.scale, whole.softcap, whole.sinks)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def cached_keys(layer: nn.Module, cached: Any) -> Tensor:
    """(B, Hkv, K, d) the keys in a layer's cache. Latent attention keeps what it expands them from in each forward."""
    latent: Any = next((module for module in shadow_copy(layer).modules() if hasattr(module, "expand_kv")), None)
    keys: Tensor = cached.keys if latent is None else latent.expand_kv(cached.keys, cached.values)[0]
    return keys


def _columns(heads: Tensor, rows: Tensor) -> Tensor:
    """The `rows` (B, n) of queries or keys (B, H, N, d)."""
    return take_rows(heads.transpose(1, 2), rows).transpose(1, 2)


def _agree(keys: Tensor, asked: Tensor, asking: Tensor) -> bool:
    """Whether the asking rows have the same keys alone as among all rows, with nothing but zeros for queries."""
    among = _columns(keys, asking)
    return among.shape == asked.shape and torch.allclose(among.float(), asked.float(), rtol=1e-2, atol=1e-2)


def _run(shadow: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> _ReachedError:
    try:
        shadow.forward(hidden, **arguments)
    except _ReachedError as reached:
        return reached.with_traceback(None)  # whose frames would hold all that the layer has made on the way
    raise NoAttentionError(f"{type(shadow).__name__} does not reach Transformers' attention interface")


class _Zeros(nn.Module):
    """Stands in for a linear module whose output is not needed: of its width, and without its work."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.width)


def shadow_copy(layer: nn.Module, skipped: tuple[str, ...] = ()) -> nn.Module:
    """A second object for the same weights, in eval mode, whose attention implementation is `_stop`.

    Nothing of `layer` is touched, not even for a moment: other threads may run it. Copied are the modules that hold a
    configuration, and all of them if some are in training mode (dropout must neither make a decision noisy nor move the
    random state of training) or run through accelerate's hooks.

    Args:
        skipped: names of linear modules whose outputs are not needed; zeros stand in for them.
    """
    everything = any(module.training or _HOOK in module.__dict__ for module in layer.modules())
    return _shadow(layer, skipped, everything, hooked=False)


def _shadow(module: nn.Module, skipped: tuple[str, ...], everything: bool, hooked: bool) -> nn.Module:
    """Made without the class's `__new__`, which sharding classes override, and without an instance's own or compiled
    `forward`, which is bound to the original.

    Args:
        hooked: whether it keeps its PyTorch hooks; those of layers and attention see real calls alone.
    """
    shadow: nn.Module = object.__new__(type(module))
    bound = ("forward", "_compiled_call_impl")
    shadow.__dict__.update({name: value for name, value in module.__dict__.items() if name not in bound})
    shadow.__dict__["training"] = False
    if "config" in shadow.__dict__:
        shadow.__dict__["config"] = copy.copy(module.config)
        shadow.__dict__["config"].__dict__["_attn_implementation_internal"] = _STOP
    if not hooked:
        shadow.__dict__.update({name: OrderedDict() for name in ("_forward_hooks", "_forward_pre_hooks")})
    if everything:  # accelerate puts offloaded weights into these, and takes them out again
        shadow.__dict__.update({name: copy.copy(module.__dict__[name]) for name in ("_parameters", "_buffers")})
    if _HOOK in shadow.__dict__:
        shadow.__dict__["forward"] = partial(_through_hook, shadow, shadow.__dict__[_HOOK])
    parts = module._modules.items()
    shadow.__dict__["_modules"] = {name: _part(name, part, skipped, everything) for name, part in parts}
    return shadow


def _part(name: str, part: nn.Module | None, skipped: tuple[str, ...], everything: bool) -> nn.Module | None:
    width = getattr(part, "out_features", None)
    if name in skipped and isinstance(width, int):
        return _Zeros(width)
    if part is None:
        return None
    configured = any("config" in inner.__dict__ for inner in part.modules())
    return _shadow(part, skipped, everything, hooked=not configured) if configured or everything else part


def _through_hook(shadow: nn.Module, hook: Any, *args: Any, **kwargs: Any) -> Any:
    """The class's forward inside accelerate's hook, which moves arguments between devices and loads weights."""
    args, kwargs = hook.pre_forward(shadow, *args, **kwargs)
    try:
        output = type(shadow).forward(shadow, *args, **kwargs)
    except _ReachedError:
        hook.post_forward(shadow, ())  # lets go of the weights
        raise
    return hook.post_forward(shadow, output)


Model = TypeVar("Model", bound=nn.Module)


def shared_copy(model: Model) -> Model:
    """A deep copy of `model` on the same tensors, with its own modules, hooks and configuration.

    accelerate's hooks, PEFT's adapters, tied and quantised weights come along; `model.compile()` does not.

    Raises:
        ValueError: if a module's `forward` was replaced by a function that would run the original.
    """
    originals = {id(module) for module in model.modules()}
    with _SharedTensors():
        copied: Model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in copied.modules():
        _forget_wrappers(module, originals)
    return copied


class _SharedTensors(TorchFunctionMode):
    """Let deep copies share tensors; parameters do not ask, and are shared by the copy's memo."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def _forget_wrappers(module: nn.Module, originals: Collection[int]) -> None:
    """Take off functions that stand in for methods of this one object, which a deep copy leaves with the original:
    accelerate puts such around `to` and `cuda`, to warn."""
    replaced = {name: value for name, value in module.__dict__.items() if isinstance(value, FunctionType)}
    for name, function in replaced.items():
        if not hasattr(type(module), name) or not _runs(function, originals):
            continue
        if name == "forward":
            raise ValueError(
                f"cannot copy this model: the forward of its {type(module).__name__} was replaced by a function, which "
                "would run the original model (torch.compile(model.forward)?). Make views first, then wrap or compile"
            )
        del module.__dict__[name]


def _runs(function: FunctionType, modules: Collection[int]) -> bool:
    """Whether a function holds one of `modules` (by id), a method of one, or another function that does."""
    seen, waiting = set[FunctionType](), [function]
    while waiting:
        seen.add(function := waiting.pop())
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        if any(id(getattr(value, "__self__", value)) in modules for value in held):
            return True
        waiting += [value for value in held if isinstance(value, FunctionType) and value not in seen]
    return False
