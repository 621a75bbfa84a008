"""Extract the queries and keys that a decoder layer passes to its attention kernel.

The exact way runs the layer's own forward on a shadow copy of it, whose attention implementation stops the forward as
soon as it is called. This is right for all that a family does before attention: norms of queries and keys, rotary
embeddings of any layout or none, latent attention, gates, several branches. Layers written like Llama's are computed
module by module, in half as many operations, after a check that the result is the same. Modules are called, and their
`.weight` is never read, so that LoRA, quantised, sharded and offloaded weights work.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache as memoized
from functools import partial
from types import FunctionType
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from pyramiddrop.hf.rows import take_rows

_STOP = "pyramiddrop_stop"
_HOOK = "_hf_hook"  # accelerate's attribute for a module's hook, which the instance's own `forward` runs
_QUERIES, _VALUES = ("q_proj", "q_b_proj"), ("v_proj",)  # projections that the keys do not depend on


@dataclass(frozen=True)
class QueryKey:
    """The inputs of a layer's attention kernel.

    Attributes:
        queries: (B, H, Q, d), rotated, of the query rows.
        keys: (B, Hkv, N, d), rotated, of all rows.
        scale: factor of the dot products.
        softcap: cap of the logits, or None.
        sinks: (H,) extra logits in the softmax, or None.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None


class NoAttentionError(RuntimeError):
    """A layer did not call Transformers' attention interface."""


class _ReachedError(Exception):
    def __init__(self, found: QueryKey) -> None:
        self.found = found


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
    """Stop the layer and return its queries and keys.

    The arguments are those of Transformers' `sdpa_attention_forward`, and positional too, because other libraries wrap
    every function of the attention interface and call it so (kvpress).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    raise _ReachedError(QueryKey(query, key, scale, options.get("softcap"), options.get("s_aux")))


AttentionInterface.register(_STOP, _stop)

PerToken = Callable[[Tensor | None], dict[str, Any]]


@dataclass(frozen=True)
class Probe:
    """A layer, its input, and the rows whose queries are wanted.

    Attributes:
        hidden: (B, N, D), the layer's input.
        rows: (B, Q) long, the query rows; None: the last row alone.
        arguments: rows (B, Q) -> the layer's further arguments for these rows of `hidden`; `arguments(None)` gives
            those for all rows.
    """

    layer: nn.Module
    hidden: Tensor
    rows: Tensor | None
    arguments: PerToken

    def take(self, hidden: Tensor) -> Tensor:
        """Gather the query rows of hidden states (B, N, D), or (streams, B, N, D) of models with several."""
        return hidden[..., -1:, :] if self.rows is None else take_rows(hidden, self.rows, -2)

    def own_arguments(self) -> dict[str, Any]:
        """The layer's further arguments for the query rows."""
        if self.rows is not None:
            return self.arguments(self.rows)
        last = torch.full((1, 1), self.hidden.shape[-2] - 1, device=self.hidden.device)
        return self.arguments(last.expand(self.hidden.shape[-3], 1))


#: How to extract from each layer, once it is known, also for a method that is applied again.
_extractors: WeakKeyDictionary[nn.Module, Callable[[Probe], QueryKey]] = WeakKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def extract(layer: nn.Module, hidden: Tensor, rows: Tensor | None, arguments: PerToken) -> QueryKey:
    """Extract the queries of the query rows and the keys of all rows; see `Probe` for the arguments."""
    probe = Probe(layer, hidden, rows, arguments)
    extractor = _extractors.get(layer)
    if extractor is None:  # once, because the comparison makes the host wait for the device
        exact, fast = _whole(probe), [_by_module] if _is_written_as_llama(probe) else []
        agreeing = (each for each in (*fast, _keys_alone) if _agree(each(probe), exact))
        extractor = _extractors[layer] = next(agreeing, _whole)
    if extractor is _by_module and not _is_written_as_llama(probe):
        extractor = _keys_alone  # its weights are currently offloaded
    return extractor(probe)


def _agree(found: QueryKey, exact: QueryKey) -> bool:
    """True if queries and keys are equal up to rounding."""
    if (found.scale, found.softcap) != (exact.scale, exact.softcap) or (found.sinks is None) != (exact.sinks is None):
        return False
    pairs = ((found.queries, exact.queries), (found.keys, exact.keys))
    return all(
        own.shape == other.shape and torch.allclose(own.float(), other.float(), rtol=1e-2, atol=1e-2)
        for own, other in pairs
    )


def _whole(probe: Probe) -> QueryKey:
    """Run the layer up to its kernel for all rows."""
    whole, rows = _run(shadow_copy(probe.layer), probe.hidden, probe.arguments(None)), probe.rows
    heads = whole.queries
    return replace(
        whole, queries=heads[:, :, -1:] if rows is None else take_rows(heads.transpose(1, 2), rows).transpose(1, 2)
    )


def _keys_alone(probe: Probe) -> QueryKey:
    """Run the layer twice: for the query rows, and for all rows with zeros as queries and values."""
    asked = _run(shadow_copy(probe.layer), probe.take(probe.hidden), probe.own_arguments())
    keyed = _run(shadow_copy(probe.layer, (*_QUERIES, *_VALUES)), probe.hidden, probe.arguments(None))
    return replace(asked, keys=keyed.keys)


# The attributes that Llama's attention reads, norms of queries and keys included.
_LLAMA = {"q_proj", "k_proj", "apply_rotary_pos_emb", "scaling", "head_dim"}
_AS_LLAMA = _LLAMA | {
    *("ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "attention_dropout", "config", "contiguous"),
    *("eager_attention_forward", "get_interface", "getattr", "k_norm", "layer_idx", "o_proj", "q_norm", "reshape"),
    *("shape", "sliding_window", "training", "transpose", "update", "v_proj", "view"),
}


def _is_written_as_llama(probe: Probe) -> bool:
    """True if a layer may be computed module by module.

    Its attention then reads only attributes that Llama's reads, and accelerate does not offload its weights.
    """
    attention: Any = getattr(probe.layer, "self_attn", None)
    if attention is None or not hasattr(probe.layer, "input_layernorm") or not _reads_as_llama(type(attention).forward):
        return False
    width: int = attention.head_dim
    norms = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    tables = probe.arguments(None).get("position_embeddings")
    return (
        probe.hidden.dim() == 3
        and isinstance(tables, tuple)
        and all(table.dim() == 3 and table.shape[-1] == width for table in tables)
        and all(parameter.shape == (width,) for norm in norms for parameter in norm.parameters())
        and not any(_HOOK in module.__dict__ for module in probe.layer.modules())
    )


@memoized
def _reads_as_llama(forward: Callable[..., Any]) -> bool:
    return _LLAMA <= set(inspect.unwrap(forward).__code__.co_names) <= _AS_LLAMA


def _by_module(probe: Probe) -> QueryKey:
    """Compute what Llama's layer computes before its kernel: the queries of the query rows, all keys, no values."""
    training = any(module.training for module in probe.layer.modules())  # without dropout
    layer: Any = shadow_copy(probe.layer) if training else probe.layer
    attention, normed = layer.self_attn, layer.input_layernorm(probe.hidden)
    rotary = probe.arguments(None)["position_embeddings"]
    own = [table[:, -1:] for table in rotary] if probe.rows is None else probe.own_arguments()["position_embeddings"]
    queries = _heads(attention, "q", probe.take(normed), *own)
    return QueryKey(queries, _heads(attention, "k", normed, *rotary), attention.scaling, None, None)


def _heads(attention: Any, kind: str, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, n, d) rotated queries or keys of `normed` (B, n, D); `cos` and `sin` are (B or 1, n, d)."""
    heads = getattr(attention, f"{kind}_proj")(normed).view(*normed.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{kind}_norm", None)
    heads = (heads if norm is None else norm(heads)).transpose(1, 2)
    first, second = heads.chunk(2, dim=-1)
    rotated: Tensor = heads * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return rotated


@torch.compiler.disable  # type: ignore[untyped-decorator]
def cached_keys(layer: nn.Module, cached: Any) -> Tensor:
    """(B, Hkv, K, d) the keys in a layer's cache; latent attention caches compressed keys, which are expanded here."""
    latent: Any = next((module for module in shadow_copy(layer).modules() if hasattr(module, "expand_kv")), None)
    keys: Tensor = cached.keys if latent is None else latent.expand_kv(cached.keys, cached.values)[0]
    return keys


def _run(shadow: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> QueryKey:
    try:
        shadow.forward(hidden, **arguments)
    except _ReachedError as reached:
        return reached.found
    raise NoAttentionError(f"{type(shadow).__name__} does not reach Transformers' attention interface")


class _Zeros(nn.Module):
    """Replacement of a linear module whose output is not needed: zeros of the same width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.width)


def shadow_copy(layer: nn.Module, skipped: tuple[str, ...] = ()) -> nn.Module:
    """A second object on the same weights, in eval mode, whose attention implementation is `_stop`.

    `layer` itself is never changed, because other threads may run it. The modules that hold a configuration are copied;
    all modules are copied if some are in training mode (dropout must neither make a decision noisy nor advance the
    random state of training) or run through accelerate's hooks. Linear modules with the names `skipped`, whose outputs
    are not needed, return zeros.
    """
    everything = any(module.training or _HOOK in module.__dict__ for module in layer.modules())
    return _shadow(layer, skipped, everything, hooked=False)


def _shadow(module: nn.Module, skipped: tuple[str, ...], everything: bool, hooked: bool) -> nn.Module:
    """A shallow copy without an instance's own or compiled `forward`, which is bound to the original.

    It is made without the class's `__new__`, which sharding classes override. PyTorch hooks are kept if `hooked`; those
    of layers and attention must see real calls only.
    """
    shadow: nn.Module = object.__new__(type(module))
    held, bound = shadow.__dict__, ("forward", "_compiled_call_impl")
    held.update({name: value for name, value in module.__dict__.items() if name not in bound}, training=False)
    if "config" in held:
        held["config"] = copy.copy(module.config)
        held["config"].__dict__["_attn_implementation_internal"] = _STOP
    if not hooked:
        held.update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    if everything:  # accelerate loads offloaded weights into these and removes them again
        held.update({name: copy.copy(module.__dict__[name]) for name in ("_parameters", "_buffers")})
    if _HOOK in held:
        held["forward"] = partial(_through_hook, shadow, held[_HOOK])
    held["_modules"] = {name: _part(name, part, skipped, everything) for name, part in module._modules.items()}
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
    """Run the class's forward inside accelerate's hook, which moves arguments between devices and loads weights."""
    args, kwargs = hook.pre_forward(shadow, *args, **kwargs)
    try:
        output = type(shadow).forward(shadow, *args, **kwargs)
    except _ReachedError:
        hook.post_forward(shadow, ())  # releases the weights
        raise
    return hook.post_forward(shadow, output)


Model = TypeVar("Model", bound=nn.Module)


def shared_copy(model: Model) -> Model:
    """A deep copy of `model` on the same tensors, with its own modules, hooks and configuration.

    accelerate's hooks, PEFT's adapters, tied and quantised weights are kept; `model.compile()` is not.

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
    """Make deep copies share tensors; parameters ignore this mode and are shared through the copy's memo."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def _forget_wrappers(module: nn.Module, originals: Collection[int]) -> None:
    """Remove functions that replace methods of one object, which a deep copy would leave bound to the original.

    accelerate wraps `to` and `cuda` in this way, to warn.
    """
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
    """True if a function refers to one of `modules` (by id), to a method of one, or to another function that does."""
    seen, waiting = set[FunctionType](), [function]
    while waiting:
        seen.add(function := waiting.pop())
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        if any(id(getattr(value, "__self__", value)) in modules for value in held):
            return True
        waiting += [value for value in held if isinstance(value, FunctionType) and value not in seen]
    return False
