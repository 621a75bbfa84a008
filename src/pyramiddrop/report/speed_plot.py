"""Plot measured speed: bars for each method and batch, with marks at the cost model's predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyramiddrop.report.tables.speed import speed_heading, way_label

Record = Mapping[str, Any]
COLORS = ("#8a8f98", "#1f6fb2", "#d9822b", "#3a8f5c", "#8d5fb0", "#b0413e")


@dataclass(frozen=True)
class _Panel:
    """One quantity: its title, its value and quartiles in a result, and its prediction (None: none)."""

    title: str
    value: Callable[[Record], float]
    quartiles: Callable[[Record], tuple[float, float]] | None = None
    predicted: Callable[[Record, Record], float] | None = None


def draw_speed(record: Record) -> Figure:
    """Draw a panel for each quantity with a bar for each method; predictions are relative to vanilla's measurement."""
    results: Sequence[Record] = record["results"]
    panels = _training_panels() if record["kind"] == "training" else _generation_panels(results)
    width = 3.1 * len(panels) + 2.2
    lines = [line for part in speed_heading(record) for line in wrap(part, int(width * 12))]
    height = 1.1 + 0.2 * len(lines) + 0.32 * len(results)
    figure = Figure(figsize=(width, height), dpi=140)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, results)
    axes[0].set_yticks(range(len(results)), [_label(result) for result in results], fontsize=8.5)
    axes[0].set_ylim(len(results) - 0.4, -0.6)
    heading = "\n".join(lines)
    figure.text(0.012, 1 - 0.1 / height, heading, ha="left", va="top", fontsize=8.5, color="#333", parse_math=False)
    figure.text(0.988, 0.06 / height, "◇ predicted by the cost model", ha="right", va="bottom", fontsize=8)
    figure.tight_layout(rect=(0, 0.2 / height, 1, 1 - (0.15 + 0.18 * len(lines)) / height))
    return figure


def check_plot_path(path: Path) -> None:
    """Raise ValueError if no plot can be written to `path`: unknown suffix or missing folder."""
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"a plot must be one of {', '.join(sorted(formats))} by its suffix; got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} to write the plot into")


def _generation_panels(results: Sequence[Record]) -> list[_Panel]:
    panels = [_timed("first token, seconds", "first_token", "flops")]
    if all(result["step"] for result in results):
        panels.append(_timed("a decode step, seconds", "step"))
    panels.append(_Panel("peak memory, MiB", lambda result: result["peak_bytes"] / 2**20))
    panels.append(
        _Panel(
            "KV cache, MiB",
            lambda result: result["kv_bytes"] / 2**20,
            predicted=lambda result, vanilla: result["predicted"]["kv_bytes"] / 2**20,
        )
    )
    return panels


def _training_panels() -> list[_Panel]:
    return [
        _timed("forward and backward, seconds", "gradients", "flops"),
        _Panel("peak memory, MiB", lambda result: result["peak_bytes"] / 2**20),
    ]


def _timed(title: str, name: str, ratio: str | None = None) -> _Panel:
    """A panel of seconds; a predicting `ratio` is relative to vanilla's median."""
    predicted = None
    if ratio is not None:

        def predicted(result: Record, vanilla: Record) -> float:
            return float(vanilla[name]["median"] * result["ratios"][ratio])

    return _Panel(
        title,
        lambda result: result[name]["median"],
        lambda result: (result[name]["low"], result[name]["high"]),
        predicted,
    )


def _draw(axis: Axes, panel: _Panel, results: Sequence[Record]) -> None:
    names = list(dict.fromkeys(result["variant"] for result in results))
    for place, result in enumerate(results):
        value = panel.value(result)
        error = None
        if panel.quartiles:
            low, high = panel.quartiles(result)
            error = [[value - low], [high - value]]
        color = COLORS[names.index(result["variant"]) % len(COLORS)]
        axis.barh(place, value, 0.72, xerr=error, color=color, error_kw={"elinewidth": 1, "capsize": 2})
        if panel.predicted and not _is_vanilla(result):
            vanilla = next(one for one in results if _is_vanilla(one) and _same_setting(one, result))
            axis.plot(panel.predicted(result, vanilla), place, "D", markersize=5, mfc="white", mec="black", mew=1)
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _is_vanilla(result: Record) -> bool:
    return bool(result["variant"] == "vanilla")


def _same_setting(one: Record, other: Record) -> bool:
    return all(one.get(name) == other.get(name) for name in ("batch", "checkpointing"))


def _label(result: Record) -> str:
    checkpointing = ["checkpointing"] if result.get("checkpointing") else []
    return ", ".join([way_label(result), *checkpointing, f"batch {result['batch']}"])
