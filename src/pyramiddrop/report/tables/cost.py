"""Tables of the cost model: methods side by side, the paper's figures beside ours, and the stages of a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import mean

from rich.table import Table

from pyramiddrop.cost import PRESETS, CostBreakdown
from pyramiddrop.evaluation.paper import Figure
from pyramiddrop.method_spec import written_option
from pyramiddrop.planning import MeasuredTimes, Plan, PublishedPlan
from pyramiddrop.report import units
from pyramiddrop.report.tables import judged, markdown_table, new_table

SHAPES_HEAD = ("name", "layers", "hidden", "intermediate", "heads", "kv heads", "visual tokens", "vision tower")
PUBLISHED_HEAD = ("average", "pyramid", "method", "visual tokens by stage", "decoder FLOPs", "KV")
PAPER_HEAD = ("where", "model", "tokens", "method", "paper", "ours", "exact")


def cost_table(costs: Sequence[tuple[str, CostBreakdown]], times: MeasuredTimes | None = None) -> Table:
    """A column for each (label, cost); the first one is the reference of the others.

    Milliseconds are shown if bench has measured the model.
    """
    table = new_table("", *(label for label, _ in costs))
    accounts = [cost for _, cost in costs]
    table.add_row("visual tokens by stage", *(units.arrow(dict.fromkeys(one.visual_by_layer)) for one in accounts))
    table.add_row("visual tokens, average", *(f"{one.average_tokens:.2f}" for one in accounts))
    _add(table, "prefill FLOPs, full", [one.full.total for one in accounts])
    for name in ("decoder", "ranking", "vision", "projector", "head"):
        _add(table, f"  {name}", [getattr(one.full, name) for one in accounts])
    _add(table, "prefill FLOPs, paper", [one.paper for one in accounts])
    _add(table, "prefill FLOPs, fastv", [one.fastv for one in accounts])
    _add(table, "a decode step", [one.step_flops for one in accounts])
    _add(table, "KV cache", [one.kv_bytes for one in accounts], units.size)
    table.add_row("  mean layer, by stage", *(" → ".join(map(units.size, _kv_by_stage(one))) for one in accounts))
    _add(table, "activations (estimate)", [one.activation_bytes for one in accounts], units.size)
    if times is not None:
        table.add_row("decoder's prefill", *_times_cells(accounts, times))
    return table


def _times_cells(costs: Sequence[CostBreakdown], times: MeasuredTimes) -> list[str]:
    """Milliseconds of each cost, with its share of the first one, if they are known."""
    first, *others = (times.milliseconds(one) for one in costs)
    assert first is not None  # the record is of this model, and the first one is vanilla
    cells = [
        units.UNKNOWN if one is None else f"{units.seconds(one / 1000)}  ({units.share(one / first)})" for one in others
    ]
    return [units.seconds(first / 1000), *cells]


def times_line(times: MeasuredTimes, found: Plan | None = None) -> str:
    """The source of the milliseconds, their error, and how to measure missing ones."""
    told = f"Milliseconds of the decoder are interpolated between the methods that bench measured ({times.about})."
    if times.error is not None:
        told += f" Predicting each of these from the others is at most {times.error:.0%} off."
    if found is not None and times.milliseconds(found.cost) is None:
        spec = ",".join(f"{name}={written_option(value)}" for name, value in found.arguments.items())
        told += f" This plan costs less than all of them: measure it with bench --method 'pyramiddrop:{spec}'."
    return told


def stages_table(plan: Plan) -> Table:
    """A row for each stage of a plan."""
    counts = plan.schedule.counts(plan.prompt.visual_tokens)
    stages = zip(plan.schedule.stages, counts, strict=True)
    rows = [(str(stage.layer), f"{stage.keep:.4g}", str(count)) for stage, count in stages]
    first = [("0", "1", str(plan.prompt.visual_tokens))] if plan.before is None else []
    return new_table("before layer", "keep", "visual tokens", rows=[*first, *rows])


def published_table(plans: Sequence[PublishedPlan], times: MeasuredTimes | None = None) -> Table:
    """A row for each published pyramid, in a section for each budget: its schedule, tokens and costs.

    Times are shown if bench has measured the model.
    """
    table = new_table(*PUBLISHED_HEAD, *(["decoder's prefill"] if times else []))
    for _, rows in groupby(plans, key=lambda one: one.tokens):
        for one in rows:
            timed = _times_cells([one.plan.vanilla, one.plan.cost], times)[1:] if times and one.within_reach else []
            table.add_row(*_published_cells(one), *timed)
        table.add_section()
    return table


def published_markdown(plans: Sequence[PublishedPlan]) -> list[str]:
    """`published_table` as the lines of a Markdown table."""
    return markdown_table(PUBLISHED_HEAD, map(_published_cells, plans))


def _published_cells(one: PublishedPlan) -> list[str]:
    found = one.plan
    if not one.within_reach:
        return [str(one.tokens), one.pyramid, f"out of reach: at least {found.spent:.0f}", "", "", ""]
    ratios = found.cost.full.decoder / found.vanilla.full.decoder, found.cost.kv_bytes / found.vanilla.kv_bytes
    steps = units.arrow(dict.fromkeys(found.cost.visual_by_layer))
    return [str(one.tokens), one.pyramid, found.line, steps, *(f"{ratio:.0%}" for ratio in ratios)]


def paper_table(figures: Sequence[Figure]) -> Table:
    """Every FLOPs figure of the paper beside ours, in TFLOPs."""
    table = new_table(*PAPER_HEAD)
    for figure in figures:
        *cells, ours, exact = _paper_cells(figure)
        table.add_row(*cells, judged(ours, figure.agrees), exact)
    return table


def paper_markdown(figures: Sequence[Figure]) -> list[str]:
    """`paper_table` as the lines of a Markdown table."""
    return markdown_table(PAPER_HEAD, map(_paper_cells, figures))


def _paper_cells(figure: Figure) -> tuple[str, ...]:
    tokens, exact = str(figure.visual_tokens), f"{figure.exact:.4f}"
    return figure.table, figure.preset, tokens, figure.method, figure.printed, figure.ours, exact


def shapes_markdown() -> list[str]:
    """The named shapes as the lines of a Markdown table."""
    rows = []
    for name, preset in PRESETS.items():
        decoder, vision = preset.shape.decoder, preset.shape.vision
        sizes = (decoder.layers, decoder.hidden, decoder.intermediate, decoder.heads, decoder.kv_heads)
        tower = f"{vision.layers} x {vision.hidden}" if vision else "not counted"
        rows.append([f"`{name}`", *map(str, sizes), str(preset.visual_tokens), tower])
    return markdown_table(SHAPES_HEAD, rows)


def paper_summary(figures: Sequence[Figure]) -> str:
    """A line on how many of the figures agree to the printed digit."""
    agreeing = sum(figure.agrees for figure in figures)
    return f"{agreeing} of {len(figures)} figures agree to the printed digit, in TFLOPs of the `paper` convention."


def _add(table: Table, name: str, values: Sequence[int], written: Callable[[float], str] = units.flops) -> None:
    """Add a row of values, each with its share of the first one, unless all are zero."""
    if any(values):
        first, *others = values
        shares = [f"  ({units.share(value / first)})" if first else "" for value in others]
        table.add_row(name, *(written(value) + share for value, share in zip(values, ["", *shares], strict=True)))


def _kv_by_stage(cost: CostBreakdown) -> list[float]:
    """Bytes of a layer's cache, averaged over the layers with equally many visual tokens, because layers with windows
    or states differ."""
    layers = zip(cost.visual_by_layer, cost.kv_by_layer, strict=True)
    return [mean(size for _, size in stage) for _, stage in groupby(layers, key=lambda layer: layer[0])]
