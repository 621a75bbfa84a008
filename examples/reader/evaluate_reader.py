"""Measures the reader in plain Transformers: exact match by group and by kind, errors clustered by picture.

python examples/reader/evaluate_reader.py                    # the bundled model on the test split
python examples/reader/evaluate_reader.py CHECKPOINT --split val --json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from pyramiddrop.assets import reader_checkpoint
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.reader import KINDS, ReaderBenchmark
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.scores import Score, score
from pyramiddrop.evaluation.tasks import same
from pyramiddrop.inference.checkpoint import load_checkpoint


def measure(model: Path, benchmark: ReaderBenchmark, batch: int, device: str) -> dict[str, Score]:
    """Exact match of greedy answers, by group and by kind."""
    drawn = list(benchmark)
    samples = [Sample((one.image,), one.question, (one.answer,), one.kind, str(one.picture)) for one in drawn]
    answerer = Answerer(load_checkpoint(model, device), batch=batch, max_new_tokens=6)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("answering", total=len(samples))
        replies = answerer.answers(samples, None, lambda count: progress.advance(bar, count))
    right = [same(reply.text, sample.answers) for reply, sample in zip(replies, samples, strict=True)]
    scores = {}
    for name in (*KINDS, *(kind for kinds in KINDS.values() for kind in kinds)):
        mine = [index for index, one in enumerate(drawn) if name in (one.group, one.kind)]
        if mine:
            scores[name] = score([right[index] for index in mine], [drawn[index].picture for index in mine])
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=reader_checkpoint(), help="folder of a checkpoint")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--pictures", type=int, default=120, help="the groups take turns")
    parser.add_argument("--questions", type=int, default=6, help="about each picture")
    parser.add_argument("--seed", type=int, default=0, help="of the benchmark's pictures")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = ReaderBenchmark(arguments.split, arguments.pictures, arguments.questions, arguments.seed)
    scores = measure(arguments.model, benchmark, arguments.batch, arguments.device)
    if arguments.json:
        print(json.dumps({name: asdict(value) for name, value in scores.items()}, indent=2))
        return
    print("| group or kind | exact match (%) | questions |\n|---|---|---|")
    for name, value in scores.items():
        print(f"| {name} | {value} | {value.count} |")


if __name__ == "__main__":
    main()
