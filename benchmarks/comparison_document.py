"""Makes the tables and the picture of docs/comparison.md from the results of benchmarks/comparison.

python benchmarks/comparison_document.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.run_experiments import HERE, Experiment, read_experiments, read_result
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from speed_document import PLACE, ROOT
from studies_document import save_pictures

from pyramiddrop.report.studies.paper_figure import COLORS, MARKERS, PAGE, literal, styled
from pyramiddrop.report.studies.study import Sheet
from pyramiddrop.report.tables.evaluation import difference_cell, eval_heading, score_cell, share_cell

DOCUMENT = ROOT / "docs" / "comparison.md"
#: The place of all boards that have no place of their own.
OTHERS = "others"
NONE = "**No other model has been run yet.**"
AXES = {"flops": "decoder FLOPs of the prefill (% of vanilla)", "time": "measured time of the prefill (% of vanilla)"}

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One experiment on one measure of quality.

    Attributes:
        method: in words.
        quality: higher is better.
        flops, time: of the prefill, as parts of vanilla's; None where they are not known.
        cells: of its row, behind the method.
    """

    method: str
    quality: float
    flops: float | None
    time: float | None
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class Panel:
    """All points that may be compared: one model, the same questions, one measure of quality."""

    title: str
    about: str
    head: tuple[str, ...]
    points: Sequence[Point]


def front(points: Sequence[Point], cost: str) -> list[Point]:
    """The Pareto front, cheapest first: points that no other is at least equal to in both and better in one.

    Args:
        cost: "flops" or "time"; points of which it is not known are left out.
    """
    known = [one for one in points if getattr(one, cost) is not None]

    def beaten(one: Point) -> bool:
        own = (-getattr(one, cost), one.quality)
        others = [(-getattr(other, cost), other.quality) for other in known]
        return any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in others)

    return sorted((one for one in known if not beaten(one)), key=lambda one: getattr(one, cost))


# --- Panels ---------------------------------------------------------------------------------------------------------


def panels(root: Path = HERE) -> dict[str, list[Panel]]:
    """Of each folder of experiments that has results."""
    found: dict[str, list[tuple[Experiment, Record]]] = {}
    for experiment in read_experiments(root):
        record = read_result(root, experiment)
        if record is not None:
            found.setdefault(experiment.board, []).append((experiment, record))
    return {board: bundled(board, runs) if runs[0][0].bundled else benchmarks(runs) for board, runs in found.items()}


def bundled(board: str, runs: Sequence[tuple[Experiment, Record]]) -> list[Panel]:
    """The one panel of a benchmark of this library's own: right answers."""
    points = []
    for experiment, record in runs:
        *_, own = record["methods"]
        time = own["prefill"]["ratio"] if own["prefill"] else None
        cells = (
            score_cell(own["scores"]["all"]),
            difference_cell(own["differences"].get("to_vanilla")),
            share_cell(own["flops_ratio"]),
            share_cell(time),
            share_cell(own["kv_ratio"]),
            f"{own['visual_tokens']['per_layer']:.1f}",
        )
        points.append(Point(experiment.method, 100 * own["scores"]["all"]["mean"], own["flops_ratio"], time, cells))
    head = ("right answers (%)", "minus vanilla", *COSTS)
    return [Panel(board, "  \n".join(eval_heading(runs[0][1])), head, points)]


#: Heads of what a method costs.
COSTS = ("decoder FLOPs", "prefill time", "KV cache", "visual tokens a layer")


def benchmarks(runs: Sequence[tuple[Experiment, Record]]) -> list[Panel]:
    """A panel for each task and score of lmms-eval."""
    found: dict[str, list[Point]] = {}
    for experiment, record in runs:
        *_, own = record["methods"]
        costs = own["costs"]
        flops = costs.get("flops_ratio")
        shown = (
            share_cell(flops),
            share_cell(None),
            share_cell(costs.get("kv_ratio")),
            _number(costs.get("retained_visual_tokens")),
        )
        for task, scores in own["scores"].items():
            for name, score in scores.items():
                error = "" if score["error"] is None else f" ± {score['error']:.4g}"
                cells = (f"{score['value']:.4g}{error}", *shown)
                found.setdefault(f"{task}, {name}", []).append(
                    Point(experiment.method, score["value"], flops, None, cells)
                )
    first = runs[0][0]
    limit = "all questions" if first.limit is None else f"{first.limit} questions of each task"
    about = f"{first.model}, lmms-eval: {limit}, batches of {first.batch}"
    return [Panel(title, about, ("score", *COSTS), points) for title, points in found.items()]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


# --- The page and its picture ---------------------------------------------------------------------------------------


def written(panel: Panel) -> str:
    """The table of a panel, the cheapest method last; the last column says on which fronts it is."""
    fronts = {name: front(panel.points, cost) for name, cost in (("FLOPs", "flops"), ("time", "time"))}
    ordered = sorted(panel.points, key=lambda one: -(one.flops or 0))
    rows = [
        (f"`{one.method.replace('|', chr(92) + '|')}`", *one.cells, ", ".join(n for n, f in fronts.items() if one in f))
        for one in ordered
    ]
    table = Sheet(panel.title, ("method", *panel.head, "on the front over"), rows).markdown()
    return f"*{panel.title}*\n\n{panel.about}\n\n{table}"


def filled(text: str, root: Path = HERE) -> str:
    """`text` with the tables of each folder between its `begin` and `end`; `others` are those without a place."""
    found = panels(root)
    own = {place[2] for place in PLACE.finditer(text)}
    found[OTHERS] = [panel for board, shown in found.items() if board not in own for panel in shown]

    def content(name: str) -> str:
        return "\n\n".join(map(written, found.get(name, ()))) or NONE

    return PLACE.sub(lambda place: place[1] + content(place[2]) + place[3], text)


def draw(shown: Sequence[Panel]) -> Figure:
    """A row a panel: quality over FLOPs, and over measured time; the line is the Pareto front."""
    methods = list(dict.fromkeys(point.method for panel in shown for point in panel.points))
    with rc_context(styled()):
        figure = Figure(figsize=(PAGE, 0.9 + 2.3 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), 2, sharey="row", squeeze=False)
        for row, panel in zip(axes, shown, strict=True):
            for axis, cost in zip(row, AXES, strict=True):
                _draw(axis, panel, cost, methods)
            row[0].set_ylabel(panel.head[0])
            row[0].set_title(panel.title, loc="left")
        for axis, label in zip(axes[-1], AXES.values(), strict=True):
            axis.set_xlabel(label)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _draw(axis: Axes, panel: Panel, cost: str, methods: Sequence[str]) -> None:
    best = front(panel.points, cost)
    costs = [100 * getattr(one, cost) for one in best]
    axis.step(costs, [one.quality for one in best], where="post", color="black", linewidth=0.8, zorder=1)
    for one in panel.points:
        if getattr(one, cost) is not None:
            place = methods.index(one.method)
            style = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}
            axis.scatter(100 * getattr(one, cost), one.quality, s=18, label=literal(one.method), zorder=2, **style)
    axis.grid(axis="y")
    axis.set_axisbelow(True)


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text("utf-8")), "utf-8")
    save_pictures({"comparison": draw([panel for shown in panels().values() for panel in shown])})
