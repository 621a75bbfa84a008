"""Plot measured speed: bars for each method and batch, with marks at the cost model's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyramiddrop.report.tables.speed import speed_heading, way_label

Record = Mapping[str, Any]
COLORS = ("#8a8f98", "#1f6fb2", "#d9822b", "#3a8f5c", "#8d5fb0", "#b0413e")
#: The titles of panels, and the quantities in a result: a spread in seconds, or bytes.
GENERATION = {
    "first token, seconds": "first_token",
    "a decode step, seconds": "step",
    "peak memory, MiB": "peak_bytes",
    "KV cache, MiB": "kv_bytes",
}
TRAINING = {"forward and backward, seconds": "gradients", "peak memory, MiB": "peak_bytes"}
MIB = 2**20


def draw_speed(record: Record) -> Figure:
    """Draw a panel for each quantity with a bar for each method; predictions are relative to vanilla's measurement."""
    results: Sequence[Record] = record["results"]
    panels = TRAINING if record["kind"] == "training" else GENERATION
    if not all(result.get("step") for result in results):
        panels = {title: name for title, name in panels.items() if name != "step"}
    width = 3.1 * len(panels) + 2.2
    lines = [line for part in speed_heading(record) for line in wrap(part, int(width * 12))]
    height = 1.1 + 0.2 * len(lines) + 0.32 * len(results)
    figure = Figure(figsize=(width, height), dpi=140)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, name) in zip(axes, panels.items(), strict=True):
        _draw(axis, name, results)
        axis.set_title(title, fontsize=9, loc="left")
    axes[0].set_yticks(range(len(results)), [_label(result) for result in results], fontsize=8.5)
    axes[0].set_ylim(len(results) - 0.4, -0.6)
    style: dict[str, Any] = {"ha": "left", "va": "top", "fontsize": 8.5, "color": "#333", "parse_math": False}
    figure.text(0.012, 1 - 0.1 / height, "\n".join(lines), **style)
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


def _draw(axis: Axes, name: str, results: Sequence[Record]) -> None:
    variants = list(dict.fromkeys(result["variant"] for result in results))
    for place, result in enumerate(results):
        value, error = result[name], None
        if isinstance(value, Mapping):
            error = [[value["median"] - value["low"]], [value["high"] - value["median"]]]
        color = COLORS[variants.index(result["variant"]) % len(COLORS)]
        width = value / MIB if error is None else value["median"]
        axis.barh(place, width, 0.72, xerr=error, color=color, error_kw={"elinewidth": 1, "capsize": 2})
        predicted = _predicted(name, result, results)
        if predicted is not None:
            axis.plot(predicted, place, "D", markersize=5, mfc="white", mec="black", mew=1)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _predicted(name: str, result: Record, results: Sequence[Record]) -> float | None:
    """The cost model's prediction, of seconds relative to vanilla's in the same setting; None if there is none."""
    if result["variant"] == "vanilla" or name not in ("first_token", "gradients", "kv_bytes"):
        return None
    if name == "kv_bytes":
        return float(result["predicted"]["kv_bytes"] / MIB)
    same = [one for one in results if all(one.get(key) == result.get(key) for key in ("batch", "checkpointing"))]
    vanilla = next(one for one in same if one["variant"] == "vanilla")
    return float(vanilla[name]["median"] * result["ratios"]["flops"])


def _label(result: Record) -> str:
    checkpointing = ["checkpointing"] if result.get("checkpointing") else []
    return ", ".join([way_label(result), *checkpointing, f"batch {result['batch']}"])
