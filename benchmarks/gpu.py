"""Measures on a CUDA GPU all that docs/speed.md has no figures of; writes a file of benchmarks/results for each part.

    python benchmarks/gpu.py                                  # all parts, one after another
    python benchmarks/gpu.py --only llava-1.5-7b training     # some of them
    python benchmarks/gpu.py --device cpu --shape tiny --visual 24 --out trial    # a trial of this command on a CPU

Random weights of real sizes, made on the device: nothing is downloaded. A part that fails does not stop the others.
`python benchmarks/speed_document.py` then puts the files into docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyramiddrop.inference import InputError
from pyramiddrop.report.tables.speed import speed_markdown
from pyramiddrop.speed.bench import Bench, BenchOptions, prepare_bench
from pyramiddrop.speed.generation import Compiler, eager, reduce_overhead
from pyramiddrop.speed.memory import total_memory

RESULTS = Path(__file__).parent / "results"
#: Of the pictures over which graphs are counted, against the shape's own.
SIZES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
#: What training a whole 7B decoder takes: weights, gradients and AdamW's state in bfloat16, and activations.
WHOLE_TRAINING = 70 * 2**30
PART_OF_TRAINING = 8  # layers, where there is less
#: What the kinds of records have on CUDA alone.
ON_CUDA = {
    "generation": ("CUDA events", "CUDA's memory statistics", "bfloat16"),
    "training": ("CUDA events", "CUDA's memory statistics", "bfloat16", "the fused optimizer"),
    "decoding": ("CUDA events", "bfloat16", "reduce-overhead"),
    "graphs": ("inductor", "host waits"),
}


@dataclass(frozen=True)
class Part:
    """One file.

    Attributes:
        kind: of the record: "generation", "training", "decoding" or "graphs".
        layers: how many of the shape's layers run; None for all.
    """

    kind: str
    shape: str
    batches: tuple[int, ...] = (1,)
    layers: int | None = None


PARTS = {
    "llava-1.5-7b": Part("generation", "llava-1.5-7b", (1, 4)),
    "llava-next-7b": Part("generation", "llava-next-7b", (1, 4)),
    "qwen2.5-vl-7b": Part("generation", "qwen2.5-vl-7b", (1, 4)),
    "training": Part("training", "llava-1.5-7b"),
    "decoding": Part("decoding", "llava-1.5-7b", (1, 4)),
    "graphs": Part("graphs", "llava-1.5-7b", layers=8),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts that `words` ask for; the exit code is that of a command."""
    asked = _parser().parse_args(words)
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("No CUDA device is here: nothing was measured. See --help for a trial on a CPU.")
        return 0
    if device.type != "cuda" and (asked.out is None or asked.shape is None):
        print("error: a trial without a GPU needs --shape and --out: what it measures are no results", file=sys.stderr)
        return 2
    if asked.here:
        return _run(asked.only[0], device, asked)
    failed = [name for name in asked.only if not _passed(name, words)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a trial")
    parser.add_argument("--out", type=Path, help="folder of the files (default: benchmarks/results)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--shape", help="for a trial: this shape in place of each part's own")
    parser.add_argument("--layers", type=int, help="for a trial")
    parser.add_argument("--visual", type=int, help="for a trial: visual tokens")
    parser.add_argument("--here", action="store_true", help="run one part in this process")
    return parser


def _passed(name: str, words: Sequence[str] | None) -> bool:
    """Run one part in a process of its own, for a CUDA error spoils all that comes after it in the same."""
    given = list(sys.argv[1:] if words is None else words)
    command = [sys.executable, __file__, *given, "--only", name, "--here"]
    return subprocess.run(command, check=False).returncode == 0


def _run(name: str, device: torch.device, asked: argparse.Namespace) -> int:
    """Measure one part and write its file."""
    start, part = time.perf_counter(), PARTS[name]
    try:
        record = _measured(part, _bench(part, device, asked), asked)
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    if device.type != "cuda":
        print(f"{name}: skipped on {device.type}: {', '.join(ON_CUDA[part.kind])}")
    path = (asked.out or RESULTS) / f"{name}-{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {path} in {time.perf_counter() - start:.0f} s\n\n{speed_markdown(record)}\n", flush=True)
    return 0


def _bench(part: Part, device: torch.device, asked: argparse.Namespace) -> Bench:
    layers = asked.layers or part.layers
    if part.kind == "training" and layers is None and total_memory(device) < WHOLE_TRAINING:
        layers = PART_OF_TRAINING
    return prepare_bench(
        BenchOptions(
            shape=asked.shape or part.shape,
            num_layers=layers,
            visual_tokens=asked.visual,
            batches=part.batches,
            device=str(device),
        )
    )


def _measured(part: Part, bench: Bench, asked: argparse.Namespace) -> dict[str, Any]:
    on_gpu = bench.subject.model.device.type == "cuda"
    if part.kind == "training":
        return bench.training(asked.repeats, optimizer=True)
    if part.kind == "decoding":
        compilers: dict[str, Compiler] = {"eager": eager} | ({"reduce-overhead": reduce_overhead} if on_gpu else {})
        return bench.decoding(asked.new_tokens, asked.repeats, compilers)
    if part.kind == "graphs":
        own = bench.subject.prompt.visual_tokens
        return bench.graphs([int(size * own) for size in SIZES], "inductor" if on_gpu else "eager")
    return bench.generation(asked.new_tokens, asked.repeats)


if __name__ == "__main__":
    sys.exit(main())
