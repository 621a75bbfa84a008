"""Measure vLLM's OpenAI server with the bundled model of 576 visual tokens: plain vLLM and PyramidDrop in turn.

python benchmarks/serving_http.py ROUNDS > benchmarks/results/serving-http.json

It needs the environment that `.ci/vllm` makes, and takes some minutes a round. Each request is a picture of its own
and a question, sent over HTTP and answered by a stream of 24 tokens. So many clients as the concurrency says each send
their next request when they have their answer. Client and server share the machine; CPU seconds are those of the
server's processes alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bundled_server import KV_BYTES, READER, Reply, Server, ask, body, machine, serving

from pyramiddrop import PyramidDrop
from pyramiddrop.evaluation.reader import ReaderBenchmark

NEW = 24  # tokens of an answer
CONCURRENCY = {1: 6, 8: 16, 32: 48}  # and how many requests are measured
VARIANTS = ("vanilla", "PyramidDrop")
SAMPLED = 0.2  # seconds between two looks at the KV cache


@dataclass(frozen=True)
class Load:
    """One concurrency, one variant, one round. Seconds of the wall clock are medians over the requests.

    Attributes:
        requests: measured.
        throughput: answer tokens a second of wall time.
        cpu_per_request: CPU seconds of the server.
        first_token: seconds from sending a request to its first token, the queue included.
        per_token: seconds between later tokens.
        peak_kv_bytes: that requests held at one moment.
    """

    variant: str
    concurrency: int
    turn: int
    requests: int
    throughput: float
    cpu_per_request: float
    first_token: float
    per_token: float
    peak_kv_bytes: int


def main() -> None:
    """Measure, and print the record."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    total = sum(CONCURRENCY.values()) + 8
    asked = [
        body(sample.image, sample.question, NEW, to_the_end=True)
        for turn in range(rounds)
        for sample in ReaderBenchmark(pictures=total, questions_per_picture=1, seed=100 + turn)
    ]
    loads: list[Load] = []
    with tempfile.TemporaryDirectory() as name:
        for turn in range(rounds):
            mine = asked[total * turn : total * (turn + 1)]
            for variant in VARIANTS if turn % 2 == 0 else VARIANTS[::-1]:
                with serving(READER, variant, Path(name)) as server:
                    loads += measured(server, variant, turn, iter(mine))
                print(f"round {turn}: {variant}", file=sys.stderr)
    json.dump(record(loads, rounds), sys.stdout, indent=1)
    print()


def measured(server: Server, variant: str, turn: int, asked: Iterator[dict[str, Any]]) -> list[Load]:
    """All concurrencies on one server, after it was warmed up."""
    run(server, [next(asked) for _ in range(8)], 4)
    found = []
    for clients, count in CONCURRENCY.items():
        mine = [next(asked) for _ in range(count)]
        with watched(server) as peak:
            cpu, start = server.cpu_seconds(), time.perf_counter()
            replies = run(server, mine, clients)
            seconds, cpu = time.perf_counter() - start, server.cpu_seconds() - cpu
        found.append(
            Load(
                variant,
                clients,
                turn,
                count,
                throughput=count * NEW / seconds,
                cpu_per_request=cpu / count,
                first_token=statistics.median(reply.first for reply in replies),
                per_token=statistics.median((reply.last - reply.first) / (NEW - 1) for reply in replies),
                peak_kv_bytes=round(max(peak) * KV_BYTES),
            )
        )
    return found


def run(server: Server, asked: Sequence[dict[str, Any]], clients: int) -> list[Reply]:
    """The replies to `asked`, which `clients` send.

    Raises:
        RuntimeError: for a request that was not answered in full.
    """
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(lambda one: ask(server.port, one), asked))
    wrong = [reply for reply in replies if not isinstance(reply, Reply) or reply.tokens != NEW]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(replies)} requests were not answered: {wrong[0]}")
    return [reply for reply in replies if isinstance(reply, Reply)]


@contextmanager
def watched(server: Server) -> Iterator[list[float]]:
    """Shares of the KV cache that requests hold, looked at again and again."""
    shares, done = [0.0], threading.Event()

    def look() -> None:
        while not done.wait(SAMPLED):
            shares.append(server.metrics()["vllm:kv_cache_usage_perc"])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield shares
    finally:
        done.set()
        thread.join()


def record(loads: list[Load], rounds: int) -> dict[str, Any]:
    """Plain numbers."""
    return {
        **machine(),
        "request": {"visual_tokens": 576, "answer_tokens": NEW},
        "method": PyramidDrop().settings(),
        "rounds": rounds,
        "loads": [
            {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(load).items()}
            for load in loads
        ],
    }


if __name__ == "__main__":
    main()
