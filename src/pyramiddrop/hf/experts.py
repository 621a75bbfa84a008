"""The mixtures of experts of a text model, read from its configuration for the cost model."""

from __future__ import annotations

from typing import Any

from pyramiddrop.cost import Experts

_COUNT = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "top_k_experts", "moe_topk")
_SHARED = ("n_shared_experts", "moe_num_shared_experts")
#: Transformers sends every row through every expert here, and through most of them zeros.
_ALL_RUN = ("llama4_text",)


def experts_of(text: Any) -> Experts | None:
    """The experts of a text model's configuration, or None where all MLPs are dense."""
    count = _first(text, _COUNT)
    if not count or not getattr(text, "enable_moe_block", True):
        return None
    width, visual = _widths(text)
    gated = getattr(text, "shared_expert_intermediate_size", 0)
    return Experts(
        count=count,
        active=count if text.model_type in _ALL_RUN else _first(text, _ACTIVE),
        intermediate=width,
        shared=gated or _shared(text, width),
        layers=_layers(text),
        shared_gate=bool(gated),
        visual=visual,
    )


def _widths(text: Any) -> tuple[int, int | None]:
    """The width of one expert, and of one of visual tokens where these have their own (ERNIE 4.5 VL)."""
    width: Any = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    return (width, None) if isinstance(width, int) else (width[0], width[1])


def _shared(text: Any, width: int) -> int:
    """The width of what stands beside the experts: shared ones, or in Gemma 4 the dense MLP."""
    if getattr(text, "enable_moe_block", False) or text.model_type == "llama4_text":
        return int(text.intermediate_size)
    return getattr(text, "share_expert_dim", None) or width * _first(text, _SHARED)


def _layers(text: Any) -> tuple[int, ...]:
    """The layers that have experts."""
    every = range(text.num_hidden_layers)
    types, chosen = getattr(text, "mlp_layer_types", None), getattr(text, "moe_layers", None)
    if types is not None:
        return tuple(layer for layer in every if types[layer] == "sparse")
    if chosen is not None:
        return tuple(chosen)
    first = getattr(text, "first_k_dense_replace", None) or 0
    step, dense = getattr(text, "decoder_sparse_step", 1), set(getattr(text, "mlp_only_layers", None) or [])
    return tuple(layer for layer in every if layer >= first and layer not in dense and (layer + 1) % step == 0)


def _first(text: Any, names: tuple[str, ...]) -> int:
    """The first of the attributes that there is and that is a number; 0 for none."""
    return next((value for name in names if (value := getattr(text, name, None))), 0)
