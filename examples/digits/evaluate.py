"""Measures the digits model: accuracy by kind, dropping methods at equal cost, single drops by layer and share.

    python examples/digits/evaluate.py                     # accuracy by kind, in plain Transformers
    python examples/digits/evaluate.py --split val --json
    python examples/digits/evaluate.py --card              # the same, written into the model card
    python examples/digits/evaluate.py --table             # written into docs/digits.md and benchmarks/results
    python examples/digits/evaluate.py --grid --scenes 40  # the same

The standard errors are clustered by scene, and the differences are paired: all methods answer the same questions.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from pyramiddrop import FastV, PyramidDrop, RandomDrop, UniformDrop
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.cost import Prompt
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.budgets import PERCENT, Budget, decoder_flops
from pyramiddrop.evaluation.digits import KIND_NAMES, KINDS, DigitsBenchmark
from pyramiddrop.evaluation.samples import Sample, digits_samples
from pyramiddrop.evaluation.scores import Array, Score, score, score_by_kind
from pyramiddrop.evaluation.tasks import same
from pyramiddrop.hf.model_info import inspect_model
from pyramiddrop.inference.checkpoint import load_checkpoint
from pyramiddrop.methods import Method

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "digits.md"
VISUAL_TOKENS = 64
PROMPT = Prompt(VISUAL_TOKENS, text_tokens=6)  # a usual one: <s> USER: ... three words ASSISTANT:
LAYERS, KEEP = (2, 4, 6), (0.5, 0.25, 0.125)
GRID_KEEP = (0.5, 0.25, 0.125, 1 / 64)
DRAWS = 3

Methods = dict[str, list[Method]]  # an empty list is vanilla; several methods are draws to average over
Results = dict[str, dict[str, Any]]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    benchmark = DigitsBenchmark(arguments.split, arguments.scenes, seed=arguments.seed)
    samples = digits_samples(arguments.split, arguments.scenes, arguments.seed)
    answerer = Answerer(load_checkpoint(arguments.model, "cpu"), batch=64, max_new_tokens=5)
    if not (arguments.table or arguments.grid):
        show_accuracy(answerer, samples, arguments)
    about = {"model": "digits", **asdict(benchmark)}
    if arguments.table:
        results = measure(answerer, samples, table_methods(answerer))
        publish("table", {"benchmark": about, "methods": results}, table_lines(results))
    if arguments.grid:
        results = measure(answerer, samples, grid_methods(answerer))
        publish("grid", {"benchmark": about, "methods": results}, grid_lines(results))


def show_accuracy(answerer: Answerer, samples: Sequence[Sample], arguments: argparse.Namespace) -> None:
    """Accuracy by kind of the model as it is."""
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("answering", total=len(samples))
        right, _ = run_method(answerer, samples, None, lambda count: progress.advance(bar, count))
    scores = score_by_kind(right, *clusters_and_kinds(samples))
    scores = {kind: scores[kind] for kind in (*KIND_NAMES, "all") if kind in scores}
    lines = ["| question | exact match (%) | questions |", "|---|---|---|"]
    names = {kind: text.format(row="R", column="C", digit="D", colour="X") for kind, text in KINDS.items()}
    lines += [f"| {names.get(kind, kind)} | {value} | {value.count} |" for kind, value in scores.items()]
    if arguments.json:
        print(json.dumps({kind: asdict(value) for kind, value in scores.items()}, indent=2))
    else:
        print("\n".join(lines))
    if arguments.card:
        replace_between(digits_checkpoint() / "README.md", arguments.split, lines)


def table_methods(answerer: Answerer) -> Methods:
    """The methods to compare, by name; those that drop cost the decoder FLOPs of PyramidDrop's default, or less."""
    shape, usual = inspect_model(answerer.checkpoint.model).shape, Counter([PROMPT])
    paper = PyramidDrop(layers=LAYERS, keep=KEEP)
    percent = 100 * decoder_flops(paper, shape, usual) / decoder_flops(None, shape, usual)
    methods: Methods = {"vanilla": [], "PyramidDrop": [paper]}
    for layer in (1, 2, 3):
        methods[f"FastV, K = {layer}"] = [Budget(PERCENT, percent).solve(FastV(layer=layer), shape, [PROMPT])]
    single = Budget(PERCENT, percent).solve(PyramidDrop(layers=[2], keep=[1.0]), shape, [PROMPT])
    methods["one drop at layer 2, ranked as PyramidDrop"] = [single]
    draws = [RandomDrop(layers=LAYERS, keep=KEEP, seed=seed) for seed in range(DRAWS)]
    methods[f"random, mean of {DRAWS} draws"] = draws
    methods["uniform"] = [UniformDrop(layers=LAYERS, keep=KEEP)]
    methods["PyramidDrop, compact positions"] = [PyramidDrop(layers=LAYERS, keep=KEEP, positions="compact")]
    return methods


def grid_methods(answerer: Answerer) -> Methods:
    """No drop, and one drop before each layer at each share."""
    cells = {
        f"{layer}/{keep:g}": [PyramidDrop(layers=[layer], keep=[keep])]
        for layer in range(1, answerer.checkpoint.num_layers)
        for keep in GRID_KEEP
    }
    return {"vanilla": [], **cells}


def measure(answerer: Answerer, samples: Sequence[Sample], methods: Methods) -> Results:
    """For each entry: scores by kind, its difference to PyramidDrop (or else to the first), and its FLOPs ratio."""
    scenes, kinds = clusters_and_kinds(samples)
    right: dict[str, Array] = {}
    ratios: dict[str, float] = {}
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("answering", total=sum(max(1, len(draws)) for draws in methods.values()))
        for name, draws in methods.items():
            progress.update(bar, description=name)
            runs = [run_method(answerer, samples, method) for method in draws or [None]]
            progress.advance(bar, len(runs))
            right[name] = np.mean([values for values, _ in runs], axis=0)
            ratios[name] = runs[0][1]
    base = right.get("PyramidDrop", right["vanilla"])
    return {
        name: {
            "flops_ratio": round(ratios[name], 4),
            "settings": [repr(method) for method in draws],
            "scores": {kind: asdict(value) for kind, value in score_by_kind(right[name], scenes, kinds).items()},
            "difference": asdict(score(right[name] - base, scenes)),
        }
        for name, draws in methods.items()
    }


def run_method(
    answerer: Answerer,
    samples: Sequence[Sample],
    method: Method | None,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[Array, float]:
    """Which answers are right under a method, and its decoder FLOPs against vanilla."""
    replies = answerer.answers(samples, method, advance)
    right = [same(reply.text, sample.answers) for reply, sample in zip(replies, samples, strict=True)]
    return np.array(right), sum(one.usage.flops for one in replies) / sum(one.vanilla.flops for one in replies)


def clusters_and_kinds(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    """The picture of each sample, and its kind of question."""
    return [sample.cluster for sample in samples], [sample.kind for sample in samples]


def table_lines(results: Results) -> list[str]:
    lines = [
        "| method | decoder FLOPs | all | difference to PyramidDrop | " + " | ".join(KIND_NAMES) + " |",
        "|---|---|---|---|" + "---|" * len(KIND_NAMES),
    ]
    for name, result in results.items():
        scores = {kind: Score(**value) for kind, value in result["scores"].items()}
        difference = Score(**result["difference"]).signed() if name != "PyramidDrop" else ""
        kinds = " | ".join(f"{100 * scores[kind].mean:.0f}" for kind in KIND_NAMES)
        lines.append(f"| {name} | {100 * result['flops_ratio']:.1f} % | {scores['all']} | {difference} | {kinds} |")
    return lines


def grid_lines(results: Results) -> list[str]:
    heads = " | ".join(f"keep {round(VISUAL_TOKENS * keep)} of {VISUAL_TOKENS}" for keep in GRID_KEEP)
    lines = [f"| one drop before layer | {heads} |", "|---|" + "---|" * len(GRID_KEEP)]
    for layer in sorted({int(name.split("/")[0]) for name in results if "/" in name}):
        cells = [str(Score(**results[f"{layer}/{keep:g}"]["scores"]["all"])) for keep in GRID_KEEP]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return [f"Without a drop: {Score(**results['vanilla']['scores']['all'])}.", "", *lines]


def publish(name: str, results: dict[str, Any], lines: list[str]) -> None:
    """The numbers into ``benchmarks/results``, the table into the page."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"digits-{name}.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    replace_between(PAGE, name, lines)
    print("\n".join(lines))


def replace_between(path: Path, name: str, lines: list[str]) -> None:
    """Put ``lines`` between the comments ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a Markdown file."""
    before, start, rest = path.read_text("utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not start or not end:
        raise SystemExit(f"{path} has no place marked '{name}'")
    path.write_text(before + start + "\n".join(lines) + "\n" + end + after, "utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=digits_checkpoint(), help="folder of a checkpoint")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--scenes", type=int, default=80, help="pictures; 16 questions about each")
    parser.add_argument("--seed", type=int, default=0, help="of the benchmark's scenes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--card", action="store_true", help="write the accuracy into the bundled model's card")
    parser.add_argument("--table", action="store_true", help="compare methods; writes docs/digits.md")
    parser.add_argument("--grid", action="store_true", help="one drop, by layer and share; writes docs/digits.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
