"""Read what one request asks of the method: another λ, other keep ratios, or no dropping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyramiddrop.schedule import Schedule, powers
from pyramiddrop.vllm.names import KEY
from pyramiddrop.vllm.rules import Rules

#: Drops nothing of a request's prompt.
OFF = "off"


def rules_for(rules: Rules, params: Any) -> Rules:
    """The rules of one request: the engine's, with its own keep ratios if `vllm_xargs` names any.

    The layers before which tokens are dropped stay those that the engine was started with.

    Args:
        rules: of the engine.
        params: vLLM's sampling parameters of the request; `extra_args` is what came as `vllm_xargs`.

    Raises:
        ValueError: for anything but a λ, a list of keep ratios, or "off".
    """
    asked = (getattr(params, "extra_args", None) or {}).get(KEY)
    if asked is None:
        return rules
    layers = rules.schedule.layers
    try:
        return replace(rules, schedule=Schedule.of(layers, _keep(asked, len(layers))))
    except ValueError as error:
        raise ValueError(
            f"vllm_xargs[{KEY!r}] must be a λ in (0, 1], a list of {len(layers)} keep ratios (for the drops before "
            f"layers {list(layers)}), or {OFF!r}: {error}"
        ) from None


def _keep(asked: Any, drops: int) -> list[float]:
    if asked == OFF:
        return [1.0] * drops
    return asked if isinstance(asked, list) else powers(asked, drops)
