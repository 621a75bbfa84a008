"""Prefill of a mid-size random Llama: measured CPU seconds against predicted FLOPs, and the share of ranking.

python benchmarks/prefill.py --json benchmarks/results/prefill-cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import pyramiddrop
from pyramiddrop import FastV, Method, PyramidDrop
from pyramiddrop.hf.ranking import Ranking

TEXT_BEFORE = 35


def random_llama(arguments: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).eval()


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Collect the CPU seconds of ranking and choosing while the block runs."""
    spent: list[float] = []
    originals = {name: getattr(Ranking, name) for name in ("score", "choose")}

    def timed(original: Callable[..., Tensor], ranking: Ranking, *arguments: Any) -> Tensor:
        start = time.process_time()
        result = original(ranking, *arguments)
        spent.append(time.process_time() - start)
        return result

    for name, original in originals.items():
        setattr(Ranking, name, lambda ranking, *arguments, original=original: timed(original, ranking, *arguments))
    try:
        yield spent
    finally:
        for name, original in originals.items():
            setattr(Ranking, name, original)


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(
    model: LlamaForCausalLM, methods: dict[str, Method | None], arguments: argparse.Namespace
) -> dict[str, Any]:
    length = arguments.visual + arguments.text
    embeds = torch.randn(1, length, arguments.hidden, dtype=model.dtype) * 0.02
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[:, TEXT_BEFORE : TEXT_BEFORE + arguments.visual] = True
    prefill = partial(model.model, inputs_embeds=embeds, use_cache=True)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    ranking: dict[str, list[float]] = {name: [] for name in methods}
    predicted = dict.fromkeys(methods, 1.0)
    kv = dict.fromkeys(methods, 1.0)
    # Interleaved, so that a slow minute of the machine hits all; the first round warms up.
    for turn in track(range(arguments.repeats + 1), description="prefills"):
        for name, method in methods.items():
            applied = nullcontext() if method is None else method(model, visual_mask=visual)
            with torch.no_grad(), applied as trace, stopwatch() as spent:
                taken = cpu_seconds(prefill)
            if turn:
                seconds[name].append(taken)
                ranking[name].append(sum(spent))
            if trace is not None:
                predicted[name], kv[name] = trace.cost().flops_ratio, trace.cost().kv_ratio
    vanilla = statistics.median(seconds["vanilla"])
    return {
        name: {
            "cpu_seconds_median": round(statistics.median(times), 3),
            "cpu_seconds_all": [round(value, 3) for value in times],
            "measured_ratio": round(statistics.median(times) / vanilla, 4),
            "flops_ratio": round(predicted[name], 4),
            "kv_ratio": round(kv[name], 4),
            "ranking_share_of_vanilla": round(statistics.median(ranking[name]) / vanilla, 4),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 1024),
        ("intermediate", 2816),
        ("layers", 24),
        ("heads", 16),
        ("kv-heads", 16),
        ("visual", 2880),
        ("text", 64),
        ("repeats", 5),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    methods = {"vanilla": None, "PyramidDrop": PyramidDrop(), "FastV": FastV(layer=2, keep=0.5)}
    result = {
        "machine": f"{platform.machine()}, {arguments.threads} thread(s), CPU only",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pyramiddrop": pyramiddrop.__version__,
        "shape": {key: value for key, value in vars(arguments).items() if key != "json"},
        "results": measure(random_llama(arguments), methods, arguments),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
