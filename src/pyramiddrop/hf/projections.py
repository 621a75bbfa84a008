"""The queries and keys of a decoder layer, taken from the layer itself on its way to the attention kernel.

The layer's own forward runs on a twin of it whose attention implementation stops everything as soon as it is called.
So the answer is exact whatever the family does before: norms of queries and keys, rotary embeddings of any layout or
none, latent attention, gates, several branches. Modules are called, never their `.weight`: LoRA, quantised and sharded
weights work.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from pyramiddrop.hf.rows import take_hidden, take_rows

_STOP = "pyramiddrop_stop"
_QUERIES, _VALUES = ("q_proj", "q_b_proj"), ("v_proj",)  # projections that the keys do not depend on


@dataclass(frozen=True)
class Projection:
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
    scaling: float | None = None,
    **options: Any,
) -> NoReturn:
    raise _ReachedError(query, key, scaling, options)


AttentionInterface.register(_STOP, _stop)

PerToken = Callable[[Tensor | None], dict[str, Any]]


class Projector:
    """Projects for one model; remembers of which layers the keys may be had alone."""

    def __init__(self) -> None:
        self._splits: dict[int, bool] = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def project(self, index: int, layer: nn.Module, hidden: Tensor, asking: Tensor, arguments: PerToken) -> Projection:
        """Queries of the rows `asking` (B, Q) and keys of all rows of `hidden` (B, N, D), in layer `index`.

        Args:
            arguments: rows (B, n) of `hidden`, or None for all -> what the layer is called with beside them.

        Raises:
            NoAttentionError: where the layer does not reach the attention interface.
        """
        if self._splits.get(index, True):
            asked = _run(_twin(layer), take_hidden(hidden, asking), arguments(asking))
            keyed = _run(_twin(layer, (*_QUERIES, *_VALUES)), hidden, arguments(None))
            if index not in self._splits:  # once, for the answer makes the host wait for the device
                self._splits[index] = _agree(keyed.keys, asked.keys, asking)
            if self._splits[index]:
                return Projection(asked.queries, keyed.keys, asked.scale, asked.softcap, asked.sinks)
        whole = _run(_twin(layer), hidden, arguments(None))
        return Projection(_columns(whole.queries, asking), whole.keys, whole.scale, whole.softcap, whole.sinks)


def _columns(heads: Tensor, rows: Tensor) -> Tensor:
    """The `rows` (B, n) of queries or keys (B, H, N, d)."""
    return take_rows(heads.transpose(1, 2), rows).transpose(1, 2)


def _agree(keys: Tensor, asked: Tensor, asking: Tensor) -> bool:
    """Whether the asking rows have the same keys alone as among all rows, with nothing but zeros for queries."""
    among = _columns(keys, asking)
    return among.shape == asked.shape and torch.allclose(among.float(), asked.float(), rtol=1e-2, atol=1e-2)


def _run(twin: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> _ReachedError:
    try:
        type(twin).forward(twin, hidden, **arguments)
    except _ReachedError as reached:
        return reached.with_traceback(None)  # whose frames would hold all that the layer has made on the way
    raise NoAttentionError(f"{type(twin).__name__} does not reach Transformers' attention interface")


class _Zeros(nn.Module):
    """Stands in for a linear module whose output is not needed: of its width, and without its work."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.width)


def _twin(module: nn.Module, skipped: tuple[str, ...] = ()) -> nn.Module:
    """A second object for the same weights, whose attention implementation is `_stop`; `module` is not touched.

    Made without the class's `__new__`, which sharding classes override; without an instance's own `forward`, which is
    bound to the original; and without hooks, whose owners are to see the layer's real calls alone.
    """
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name != "forward"})
    if "config" in twin.__dict__:
        twin.__dict__["config"] = copy.copy(module.config)
        twin.__dict__["config"].__dict__["_attn_implementation_internal"] = _STOP
    twin.__dict__.update({name: OrderedDict() for name in ("_forward_hooks", "_forward_pre_hooks")})
    twin.__dict__["_modules"] = {name: _part(name, part, skipped) for name, part in module._modules.items()}
    return twin


def _part(name: str, part: nn.Module | None, skipped: tuple[str, ...]) -> nn.Module | None:
    width = getattr(part, "out_features", None)
    if name in skipped and isinstance(width, int):
        return _Zeros(width)
    if part is not None and any("config" in inner.__dict__ for inner in part.modules()):
        return _twin(part, skipped)
    return part
