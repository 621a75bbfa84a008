"""Measure single steps of vLLM's CPU engine, plain and with PyramidDrop; print one JSON record.

python benchmarks/serving_steps.py ROUNDS > benchmarks/results/serving-steps.json

It needs the environment that `.ci/vllm` makes, and takes a minute or two a round. The model and the requests are those
of benchmarks/serving.py; the clock counts CPU seconds of the process. Three questions:

- What does a step of decoding cost, and what would it cost if each step were described anew?
- What does the same step cost uncompiled? So a step runs its decoding requests if another request's picture is in it.
- What does that step cost: the prefill of one request while others decode? Split in two, it would cost the prefill
  alone and the decoding alone.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bundled_server import machine

from pyramiddrop.vllm.batch import Batch
from serving import PLENTY, close, engine, prompt, sampling, save_model, scheduler

REQUESTS = (1, 8, 32)
STEPS, PREFILLS = 30, 5
VARIANTS = ("vanilla", "PyramidDrop")
_names = itertools.count()


def main() -> None:
    """Measure, and print the record."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(Path(name))
        for turn in range(rounds):
            for variant in VARIANTS if turn % 2 == 0 else VARIANTS[::-1]:
                steps = measured(folder, variant)
                found += [{"turn": turn, "variant": variant, **step} for step in steps]
                print(f"round {turn}: {variant}: {steps}", file=sys.stderr)
    json.dump({**machine(), "rounds": rounds, "steps": found}, sys.stdout, indent=1)
    print()


def measured(folder: Path, variant: str) -> list[dict[str, Any]]:
    """For each number of requests that decode, milliseconds of CPU of a step, medians.

    `decode`: as vLLM's default has it; `anew`: described anew; `uncompiled`; `together`: with another request's
    prefill; `split`: that prefill alone, and one more step that decodes.
    """
    llm = engine(folder, variant, PLENTY, eager=False)
    alone, found = prefill(llm), []
    for count in REQUESTS:
        with decoding(llm, count):
            decode = decode_step(llm)
            with each_step_anew():
                anew = decode_step(llm)
            together = prefill(llm)
        found.append({"requests": count, "decode": decode, "together": together, "split": alone + decode})
        if variant != "vanilla":
            found[-1]["anew"] = anew
    close(llm)
    llm = engine(folder, variant, PLENTY)
    for step in found:
        with decoding(llm, step["requests"]):
            step["uncompiled"] = decode_step(llm)
    close(llm)
    return found


@contextmanager
def decoding(llm: Any, count: int) -> Iterator[None]:
    """`count` requests whose prompts are computed and which go on to answer."""
    core = llm.llm_engine
    names = [f"decodes-{next(_names)}" for _ in range(count)]
    for number, name in enumerate(names):
        core.add_request(name, prompt(number), sampling(4 * STEPS))
    while any(not request.num_output_tokens for request in scheduler(llm).requests.values()):
        core.step()
    yield
    core.abort_request(names)
    while core.has_unfinished_requests():
        core.step()


def decode_step(llm: Any) -> float:
    """A step of the requests that decode."""
    return round(statistics.median(_timed(llm) for _ in range(STEPS)), 3)


def prefill(llm: Any) -> float:
    """A step with one request's whole prompt, picture and all, beside the requests that decode, if there are any."""
    took = []
    for _ in range(PREFILLS):
        name = f"prefill-{next(_names)}"
        llm.llm_engine.add_request(name, prompt(len(took)), sampling(2))
        took.append(_timed(llm))
        llm.llm_engine.abort_request([name])
        llm.llm_engine.step()  # the worker hears that it has ended
    return round(statistics.median(took[1:]), 3)


@contextmanager
def each_step_anew() -> Iterator[None]:
    """Let no step of decoding go on from the description of the step before."""
    known = Batch._decodes_on
    Batch._decodes_on = lambda *described: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        Batch._decodes_on = known  # type: ignore[method-assign]


def _timed(llm: Any) -> float:
    start = time.process_time()
    llm.llm_engine.step()
    return 1000 * (time.process_time() - start)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
