"""Makes the tables of docs/serving.md from benchmarks/results/serving*.json.

python benchmarks/serving_document.py

Each file was measured by the script of the same name.
"""

from __future__ import annotations

import json
import re
import statistics
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyramiddrop.report.units import seconds, size

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "serving.md"
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
VARIANTS = ("vanilla", "PyramidDrop")
Row = tuple[str, str, Callable[[float], str]]
ROWS: tuple[Row, ...] = (
    ("answer tokens/s", "throughput", "{:.1f}".format),
    ("first token", "first_token", seconds),
    ("a later token", "per_token", seconds),
    ("peak KV cache", "peak_kv_bytes", size),
)
HTTP_ROWS: tuple[Row, ...] = (*ROWS, ("CPU of the server a request", "cpu_per_request", seconds))


def filled(text: str) -> str:
    """`text` with the tables between its marks."""

    def content(name: str) -> str:
        record = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        lines = "\n".join(TABLES[name](record)).splitlines()
        return "\n".join(line if line.startswith("|") else textwrap.fill(line, 120) for line in lines)

    return PLACE.sub(lambda place: f"{place[1]}{content(place[2])}\n{place[3]}", text)


def engine_table(record: dict[str, Any]) -> Iterator[str]:
    """The engine in one process: what was measured on, one table of all loads, and how many requests fit."""
    model, request, versions = record["model"], record["request"], record["versions"]
    fit = record["requests_that_fit"]
    yield (
        f"A random LLaVA: {model['layers']} layers, hidden {model['hidden']}, {model['dtype']}; requests of "
        f"{request['visual_tokens']} visual tokens and {request['words']} words, answers of {request['answer_tokens']} "
        f"tokens; 4 equal stages, λ = 0.5. {record['machine']['kind']}, one thread; vLLM {versions['vllm']}, torch "
        f"{versions['torch']}. CPU seconds of the process, so that other programs do not count; medians over the "
        f"requests, then over {record['rounds']} rounds. The first token's time holds the time in the queue."
    )
    yield from _load_table(record["loads"], ROWS)
    yield (
        f"\nIn {size(record['kv_budget_bytes'])} of KV cache {fit['vanilla']} such requests run at a time without "
        f"dropping, and {fit['PyramidDrop']} with PyramidDrop."
    )


def http_table(record: dict[str, Any]) -> Iterator[str]:
    """The OpenAI server with the bundled model."""
    request = record["request"]
    yield (
        f"The bundled model of {request['visual_tokens']} visual tokens (12 layers, hidden 192) behind vLLM's OpenAI "
        f"server; requests of a picture each, streamed answers of {request['answer_tokens']} tokens; 4 equal stages, "
        f"λ = 0.5. {_machine(record)}. Seconds of the wall clock, clients on the same machine; medians over the "
        f"requests, then over the rounds ({record['rounds']}) in which both servers take turns."
    )
    yield from _load_table(record["loads"], HTTP_ROWS)


def soak_table(record: dict[str, Any]) -> Iterator[str]:
    """The long run, one column a variant."""
    runs = [record["runs"][variant] for variant in VARIANTS]
    yield f"{record['requests']} requests of {record['clients']} clients. {_machine(record)}."
    yield "\n| | vanilla | PyramidDrop |\n|---|---|---|"
    for name in ("answered", "wrong", "cut", "refused", "bad pictures answered", "lost"):
        yield f"| {name} | {runs[0][name]} | {runs[1][name]} |"
    for name in ("running", "waiting", "kv_cache_share"):
        left = " | ".join(f"{run['left over'][name]:g}" for run in runs)
        yield f"| left over: {name.replace('_', ' ')} | {left} |"
    memory = [run["resident_mib"] for run in runs]
    every = record["requests"] // (len(memory[0]) - 1)
    for index in (0, 1, 3, 5, 7, len(memory[0]) - 1):
        when = f"after {index * every} requests" if index else "at the start"
        yield f"| resident memory {when} | " + " | ".join(f"{resident[index]} MiB" for resident in memory) + " |"


def _machine(record: dict[str, Any]) -> str:
    versions = record["versions"]
    return f"{record['machine']}, {record['date']}, one thread; vLLM {versions['vllm']}, torch {versions['torch']}"


def _load_table(loads: list[dict[str, Any]], rows: tuple[Row, ...]) -> Iterator[str]:
    yield "\n| clients | | vanilla | PyramidDrop | ratio |\n|---|---|---|---|---|"
    for clients in dict.fromkeys(load["concurrency"] for load in loads):
        for title, name, shown in rows:
            before, after = (_median(loads, variant, clients, name) for variant in VARIANTS)
            yield f"| {clients} | {title} | {shown(before)} | {shown(after)} | {after / before:.2f} |"


def _median(loads: list[dict[str, Any]], variant: str, clients: int, name: str) -> float:
    """Over the rounds."""
    mine = [load for load in loads if (load["variant"], load["concurrency"]) == (variant, clients)]
    return statistics.median(load[name] for load in mine)


TABLES: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "serving.json": engine_table,
    "serving-http.json": http_table,
    "serving-soak.json": soak_table,
}


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
