"""Show a speed measurement's record: its heading, and its tables on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.table import Table

from pyramiddrop.report import units
from pyramiddrop.report.tables import markdown_table, new_table

Record = Mapping[str, Any]


def speed_heading(record: Record) -> list[str]:
    """What was run, on which machine, and how it was timed, a line each."""
    machine, subject, setting = record["machine"], record["subject"], record["setting"]
    visual = ", ".join(map(str, setting.get("visual_tokens", [subject["visual_tokens"]])))
    prompt = f"{visual} visual + {subject['text_tokens']} text tokens"
    if subject.get("pictures", 1) > 1:
        prompt += f", {subject['pictures']} pictures"
    if subject.get("padded"):
        prompt += ", padded"
    if "new_tokens" in setting:
        prompt += f", {setting['new_tokens']} new"
    where = "" if machine["device"] == "cpu" else f"{machine['device']}, {units.size(machine['device_bytes'])}; "
    return [
        f"{subject['name']}: {subject['about']}; {subject['layers']} layers, hidden {subject['hidden']}, {prompt}, "
        f"{subject['dtype']}, {subject['attention']}",
        f"{where}{machine['architecture']}, {machine['cpu_cores']} cores, {machine['threads']} thread(s); "
        f"torch {machine['torch']}, transformers {machine['transformers']}",
        _how(record["kind"], setting),
    ]


def _how(kind: str, setting: Record) -> str:
    if kind == "graphs":
        return f"graphs after each picture, each layer compiled (backend {setting['backend']}), no cache"
    runs = f"{setting['clock']}, median and quartiles of {setting['repeats']} run(s)"
    if kind == "decoding":
        return f"{runs}, on a StaticCache, one method after another, each after a warm-up that compiles"
    trained = f", LoRA of rank {setting['lora_rank']}" if "lora_rank" in setting else ""
    return f"{runs}, methods taken in turn after a warm-up{trained}"


def speed_notes(record: Record) -> list[str]:
    """Notes on how to read the columns."""
    if record["kind"] == "training":
        return [
            "FLOPs: predicted ratio of layers, ranking and head. Peak: activations and gradients at their most, above "
            "the weights. Every ratio is to vanilla of the same batch and checkpointing."
        ]
    if record["kind"] == "overhead":
        return [
            "Operations: ATen's, on the device and on the host, without views. Every ratio is to vanilla of the same "
            "batch; it counts what dropping saves, too."
        ]
    return [
        "First token: from the call of generate to the first logits. Decoder: the part inside the text model. FLOPs: "
        "attention over all pairs of rows; causal: without the pairs that a causal kernel skips. Speed-up, of "
        "predicted: the decoder's over that of the FLOPs. Every ratio is to vanilla of the same batch.",
        "Dropping: planning, ranking, gathering rows, masks and positions. Peak memory: tensors at their most, above "
        "the weights. KV cache: what the keys and values hold after the prefill.",
    ]


def speed_tables(record: Record) -> list[Table]:
    """A table for each batch size, for the terminal."""
    return [new_table(*head, rows=rows) for head, rows in _grids(record)]


def speed_markdown(record: Record) -> str:
    """The heading and the results as Markdown."""
    tables = ["\n".join(markdown_table(*grid)) for grid in _grids(record)]
    return "\n\n".join(["  \n".join(speed_heading(record)), *tables])


def _grids(record: Record) -> Iterator[tuple[Sequence[str], Sequence[Sequence[str]]]]:
    """The head and the rows of a table for each batch size (and for each checkpointing or compiler setting)."""
    for title, found in groupby(record["results"], _title):
        results = list(found)
        columns = [_COLUMNS[record["kind"]](result) for result in results]
        yield (title, *map(way_label, results)), [(name, *(cells[name] for cells in columns)) for name in columns[0]]


def way_label(result: Record) -> str:
    """The method, with a note if it computes the logits of kept rows alone."""
    return f"{result['variant']}, kept logits" if result.get("logits") == "kept" else str(result["variant"])


def _title(result: Record) -> str:
    if "batch" not in result:
        return ""
    checkpointing = {None: "", True: ", checkpointing", False: ", no checkpointing"}[result.get("checkpointing")]
    compiled = f", {result['compiled']}" if "compiled" in result else ""
    return f"batch {result['batch']}{checkpointing}{compiled}"


def _generation_column(result: Record) -> dict[str, str]:
    ratios = result["ratios"]
    return {
        **_timed(result, "first token", "first_token"),
        "decoder, ratio": _ratio(ratios["decoder"]),
        "predicted: FLOPs": _ratio(ratios["flops"]),
        "predicted: FLOPs, causal": _ratio(ratios["causal_flops"]),
        "speed-up, of predicted": units.share(result["of_predicted"]),
        "dropping, of its prefill": f"{100 * result['dropping_share']:.1f} %",
        **(_step_rows(result) if result["step"] else {}),
        "whole call": units.seconds(result["whole"]["median"]),
        "whole call, ratio": _ratio(ratios["whole"]),
        "peak memory": units.size(result["peak_bytes"]),
        "KV cache": units.size(result["kv_bytes"]),
        "predicted: KV cache": units.size(result["predicted"]["kv_bytes"]),
    }


def _training_column(result: Record) -> dict[str, str]:
    ratios, update = result["ratios"], result["optimizer"]
    return {
        **_timed(result, "a step", "whole"),
        "forward and backward, ratio": _ratio(ratios["gradients"]),
        "predicted: FLOPs": _ratio(ratios["flops"]),
        "forward": units.seconds(result["forward"]["median"]),
        "backward": units.seconds(result["backward"]["median"]),
        **({"optimizer": units.seconds(update["median"])} if update else {}),
        "peak memory": units.size(result["peak_bytes"]),
        "peak memory, ratio": _ratio(ratios["peak_bytes"]),
    }


def _decoding_column(result: Record) -> dict[str, str]:
    return {**_step_rows(result), "graphs": str(result["graphs"]), "no CUDA graph": str(result["not_captured"])}


def _overhead_column(result: Record) -> dict[str, str]:
    return {
        "operations of a prefill": str(result["prefill_ops"]),
        "added": f"{result['added']['prefill_ops']:+d}",
        **_timed(result, "a prefill", "prefill"),
        "operations of a step": str(result["step_ops"]),
        "added to a step": f"{result['added']['step_ops']:+d}",
        **_timed(result, "a step", "step"),
    }


def _graphs_column(result: Record) -> dict[str, str]:
    waits = {} if result["waits"] is None else {"host waits, a prefill": str(result["waits"])}
    return {"graphs": ", ".join(map(str, result["graphs"])), **waits}


_COLUMNS = {
    "generation": _generation_column,
    "training": _training_column,
    "decoding": _decoding_column,
    "graphs": _graphs_column,
    "overhead": _overhead_column,
}


def _step_rows(result: Record) -> dict[str, str]:
    """The rows of a decode step and of the whole call."""
    return {**_timed(result, "a step", "step"), "tokens/s": f"{result['tokens_per_second']:.1f}"}


def _timed(result: Record, title: str, name: str) -> dict[str, str]:
    """The median, the distances of the quartiles from it, and the ratio to vanilla's."""
    spread = result[name]
    low, high = (100 * (spread[end] / spread["median"] - 1) for end in ("low", "high"))
    return {
        title: units.seconds(spread["median"]),
        f"{title}, quartiles": f"{low:+.1f} {high:+.1f} %",
        f"{title}, ratio": _ratio(result["ratios"][name]),
    }


def _ratio(value: float) -> str:
    return f"{value:.3f}"
