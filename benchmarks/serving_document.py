"""Makes the tables of docs/serving.md from benchmarks/results/serving.json, which benchmarks/serving.py measured.

python benchmarks/serving_document.py
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyramiddrop.report.units import seconds, size

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "serving.md"
RESULT = ROOT / "benchmarks" / "results" / "serving.json"
PLACE = re.compile(r"(<!-- begin serving.json -->\n).*?(<!-- end -->)", re.DOTALL)
ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("answer tokens/s", "throughput", "{:.1f}".format),
    ("first token", "first_token", seconds),
    ("a later token", "per_token", seconds),
    ("peak KV cache", "peak_kv_bytes", size),
)


def filled(text: str) -> str:
    """`text` with the tables between its marks."""
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    return PLACE.sub(lambda place: f"{place[1]}{tables(record)}\n{place[2]}", text)


def tables(record: dict[str, Any]) -> str:
    """What was measured on, one table of all loads, and how many requests fit."""
    fit = record["requests_that_fit"]
    return "\n".join(
        [
            _setting(record),
            "",
            "| clients | | vanilla | PyramidDrop | ratio |",
            "|---|---|---|---|---|",
            *_load_rows(record["loads"]),
            "",
            f"In {size(record['kv_budget_bytes'])} of KV cache {fit['vanilla']} such requests run at a time without "
            f"dropping, and {fit['PyramidDrop']} with PyramidDrop.",
        ]
    )


def _setting(record: dict[str, Any]) -> str:
    model, request, versions = record["model"], record["request"], record["versions"]
    return (
        f"A random LLaVA: {model['layers']} layers, hidden {model['hidden']}, {model['dtype']}; requests of "
        f"{request['visual_tokens']} visual tokens and {request['words']} words, answers of {request['answer_tokens']} "
        f"tokens; 4 equal stages, λ = 0.5. {record['machine']['kind']}, one thread; vLLM {versions['vllm']}, torch "
        f"{versions['torch']}. CPU seconds of the process, so that other programs do not count; medians over the "
        f"requests, then over {record['rounds']} rounds. The first token's time holds the time in the queue."
    )


def _load_rows(loads: list[dict[str, Any]]) -> list[str]:
    rows = []
    for clients in dict.fromkeys(load["concurrency"] for load in loads):
        for title, name, shown in ROWS:
            before, after = (_median(loads, variant, clients, name) for variant in ("vanilla", "PyramidDrop"))
            rows.append(f"| {clients} | {title} | {shown(before)} | {shown(after)} | {after / before:.2f} |")
    return rows


def _median(loads: list[dict[str, Any]], variant: str, clients: int, name: str) -> float:
    """Over the rounds."""
    return statistics.median(
        load[name] for load in loads if (load["variant"], load["concurrency"]) == (variant, clients)
    )


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
