"""A budget: the limit, its unit, and the cost of each layer and each ranking in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from pyramiddrop.cost import (
    CONVENTIONS,
    ModelShape,
    Prompt,
    estimate_cost,
    fastv_layer_flops,
    layer_flops,
    layer_kv_bytes,
    paper_layer_flops,
    ranking_flops,
)
from pyramiddrop.cost.estimate import drop_counts, visual_by_layer
from pyramiddrop.schedule import Schedule

KINDS = ("tokens", "tflops", "percent", "kv_bytes", "milliseconds")


class Clock(Protocol):
    """Gives the milliseconds of one decoder layer and of one ranking over some rows, on some machine."""

    def layer(self, rows: int) -> float:
        """Milliseconds of one decoder layer over `rows` rows."""

    def ranking(self, rows: int) -> float:
        """Milliseconds of one ranking of `rows` rows."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The largest cost of a prefill: exactly one of the five limits.

    Attributes:
        tokens: visual tokens in a layer, averaged over the layers.
        tflops: TFLOPs of the prefill, counted by `convention`.
        percent: percentage of vanilla's FLOPs, counted by `convention`.
        kv_bytes: bytes of the KV cache after the prefill.
        milliseconds: time of the decoder's layers and the rankings, measured by `clock`.
        convention: "full", "paper" or "fastv"; see `pyramiddrop.cost`.

    Raises:
        ValueError: if not exactly one limit is given, or it is not positive; the message names it.
    """

    tokens: float | None = None
    tflops: float | None = None
    percent: float | None = None
    kv_bytes: float | None = None
    milliseconds: float | None = None
    convention: str = "full"
    clock: Clock | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget is exactly one of {', '.join(KINDS)}; got {', '.join(given) or 'none'}")
        if not self.limit > 0:
            raise ValueError(f"{self.kind} must be positive; got {self.limit:g}")
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}; got {self.convention!r}")
        if (self.kind == "milliseconds") != (self.clock is not None):
            raise ValueError("a budget in milliseconds, and no other, needs a clock")

    @property
    def kind(self) -> str:
        """The name of the given limit."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def limit(self) -> float:
        """The limit in its own unit."""
        return float(getattr(self, self.kind))

    def describe(self, value: float) -> str:
        """`value`, in the budget's unit, as text."""
        return {
            "tokens": f"an average of {value:g} visual tokens",
            "tflops": f"{value:.4g} TFLOPs ({self.convention})",
            "percent": f"{value:.4g} % of vanilla's FLOPs ({self.convention})",
            "kv_bytes": f"{value:.0f} bytes of KV cache",
            "milliseconds": f"{value:.4g} ms",
        }[self.kind]


@dataclass(frozen=True, kw_only=True)
class Meter:
    """The cost of a schedule in a budget's unit: a sum over layers and rankings.

    Attributes:
        layer: gives the cost of a 0-based layer, by the visual tokens in it and in the layer whose keys it reads.
        ranking: gives the cost of ranking some visual tokens and the text.
        sources: for each layer, the layer whose keys it attends to.
        fixed: the cost that does not depend on the schedule.
        whole: the sum that corresponds to `units` of the budget's unit.
    """

    layer: Callable[[int, int, int], float]
    ranking: Callable[[int], float] = lambda visual: 0
    sources: tuple[int, ...]
    tokens: int
    fixed: float = 0
    whole: float = 1
    units: int = 1

    @property
    def layers(self) -> int:
        """The number of layers of the model."""
        return len(self.sources)

    def spent(self, schedule: Schedule | None) -> float:
        """The cost of `schedule` (None: vanilla) in the budget's unit."""
        visual = visual_by_layer(schedule, self.tokens, self.layers)
        layers = sum(self.layer(layer, count, visual[self.sources[layer]]) for layer, count in enumerate(visual))
        drops = drop_counts(schedule, Prompt(self.tokens))
        ranked = sum(self.ranking(drop.visual) for drop in drops if drop.layer)  # no layer ranks before the decoder
        return self.in_units(layers + ranked)

    def in_units(self, amount: float) -> float:
        """The sum `amount` over layers and rankings, plus the fixed cost, in the budget's unit."""
        return self.units * (self.fixed + amount) / self.whole


def meter(budget: Budget, model: ModelShape, prompt: Prompt, ranking_before: int = 0) -> Meter:
    """The meter of `budget` for a prefill of `prompt`; ranking before the decoder costs `ranking_before` FLOPs."""
    shape, text = model.decoder, prompt.text_tokens
    made = partial(Meter, sources=shape.sources, tokens=prompt.visual_tokens)
    if (clock := budget.clock) is not None:
        return made(layer=lambda _, n, __: clock.layer(n + text), ranking=lambda n: clock.ranking(n + text))
    if budget.kind == "tokens":
        return made(layer=lambda _, n, __: n, whole=shape.layers)
    if budget.kind == "kv_bytes":
        return made(layer=lambda layer, n, _: layer_kv_bytes(shape, n + text, layer))
    vanilla = estimate_cost(model, prompt)
    whole, units = (1e12, 1) if budget.kind == "tflops" else (vanilla.flops(budget.convention), 100)
    if budget.convention != "full":
        published = paper_layer_flops if budget.convention == "paper" else fastv_layer_flops
        return made(layer=lambda layer, n, _: published(shape, n, layer), whole=whole, units=units)
    return made(
        layer=lambda layer, n, keys: layer_flops(shape, n + text, layer, keys + text, n),
        ranking=lambda n: ranking_flops(shape, n + text),
        fixed=vanilla.full.total - vanilla.full.decoder + ranking_before,
        whole=whole,
        units=units,
    )
