"""Trains the bundled model on with and without PyramidDrop, for equal steps from the same weights, and asks both.

    python examples/digits/training_study.py              # about 25 CPU minutes; stopped? run it again, it goes on
    python examples/digits/training_study.py --document   # writes the tables of docs/training.md from what was measured
    python examples/digits/training_study.py --save runs/models   # leaves two of the models, for docs/studies.md

Every seed is its own data and order, the same for all ways to train. The answers are those of the test split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from evaluate import replace_between, run_method
from transformers import TrainerCallback

from pyramiddrop import FastV, Method, PyramidDrop
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.digits import DigitsBenchmark
from pyramiddrop.evaluation.samples import Sample, digits_samples
from pyramiddrop.evaluation.scores import Array, Score, score
from pyramiddrop.inference.checkpoint import load_checkpoint
from pyramiddrop.training.run import TrainOptions, prepare_training

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "digits-training-study.json"
PAGE = ROOT / "docs" / "training.md"
SEEDS = (0, 1, 2)
LAMBDAS = (0.4, 0.5, 0.6)
STEPS, BATCH, LEARNING_RATE, PER_SCENE = 150, 32, 3e-4, 8
SCENES = 60
VANILLA = "vanilla"


class StepTimes(TrainerCallback):
    """CPU seconds of every step: forward, backward and optimizer, without the making of the batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    if arguments.save:
        save_models(arguments.save, arguments.steps, arguments.learning_rate)
        return
    if not arguments.document:
        measure(arguments.steps, arguments.learning_rate, arguments.seeds)
    write_document(json.loads(RESULTS.read_text("utf-8")))


def ways() -> list[str]:
    """The ways to train, in words."""
    return [VANILLA, *(f"λ = {lam}" for lam in LAMBDAS)]


def open_record(results: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """What was measured so far, or nothing yet; SystemExit if it was measured with another setting."""
    if not results.exists():
        return {"setting": setting, "runs": {}}
    record: dict[str, Any] = json.loads(results.read_text("utf-8"))
    if record["setting"] != setting:
        raise SystemExit(f"{results} was measured with {record['setting']}; move it away")
    return record


def measure(steps: int, learning_rate: float, seeds: int) -> None:
    """Train and ask, one run after the other; what RESULTS holds already is not done again."""
    setting = {"steps": steps, "batch": BATCH, "learning_rate": learning_rate, "scenes": SCENES}
    record = open_record(RESULTS, setting)
    samples = digits_samples("test", SCENES)
    if "start" not in record:
        record["start"] = ask_all(digits_checkpoint(), VANILLA, samples)
        save(record)
    for seed in SEEDS[:seeds]:
        with tempfile.TemporaryDirectory() as folder:
            data = write_data(Path(folder), seed, steps * BATCH)
            for way in ways():
                name = f"{way}/{seed}"
                if name not in record["runs"]:
                    record["runs"][name] = one_run(way, seed, data, steps, learning_rate, samples)
                    save(record)
                    print(name, {k: round(float(np.mean(v)), 3) for k, v in record["runs"][name]["right"].items()})


def write_data(folder: Path, seed: int, count: int) -> Path:
    """A training set in LLaVA's format: pictures, and a JSON of conversations of one question each."""
    records = []
    for sample in DigitsBenchmark("train", -(-count // PER_SCENE), PER_SCENE, seed=seed):
        picture = folder / f"{sample.scene}.png"
        if not picture.exists():
            sample.image.save(picture)
        asked, told = f"<image>\n{sample.question}", sample.answer
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]
        records.append({"image": picture.name, "conversations": turns})
    path = folder / "train.json"
    path.write_text(json.dumps(records), "utf-8")
    return path


def one_run(
    way: str, seed: int, data: Path, steps: int, learning_rate: float, samples: Sequence[Sample]
) -> dict[str, Any]:
    """Train in one way, then ask."""
    with tempfile.TemporaryDirectory() as folder:
        trained = train(way, seed, data, steps, learning_rate, Path(folder))
        return {**trained, **ask_all(Path(folder), way, samples)}


def train(way: str, seed: int, data: Path, steps: int, learning_rate: float, folder: Path) -> dict[str, Any]:
    """Train in one way, and leave the model in `folder`."""
    lam = None if way == VANILLA else float(way.split()[-1])
    method = VANILLA if lam is None else f"pyramiddrop:lam={lam}"
    job = prepare_training(
        TrainOptions(
            model=str(digits_checkpoint()),
            data=str(data),
            output=folder,
            method=method,
            steps=steps,
            batch=BATCH,
            device_batch=BATCH,
            learning_rate=learning_rate,
            checkpointing=False,
            log_every=25,
            seed=seed,
        )
    )
    times = StepTimes()
    job.trainer.add_callback(times)
    start = time.process_time()
    job.run()
    total = time.process_time() - start
    losses = [entry["loss"] for entry in job.trainer.state.log_history if "loss" in entry]
    return {"step_seconds": round(median(times.seconds), 4), "total_seconds": round(total, 1), "losses": losses}


def save_models(folder: Path, steps: int, learning_rate: float) -> None:
    """Train without and with PyramidDrop (λ = 0.5), of the first seed, and leave both models in `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        data = write_data(Path(scratch), SEEDS[0], steps * BATCH)
        for name, way in (("without", VANILLA), ("with", "λ = 0.5")):
            train(way, SEEDS[0], data, steps, learning_rate, folder / name)


def ask_all(checkpoint: Path, way: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """1 or 0 for every question under each way to infer."""
    answerer = Answerer(load_checkpoint(checkpoint, "cpu"), batch=64, max_new_tokens=5)
    right: dict[str, list[int]] = {}
    for name, method in inferences(way):
        values, _ = run_method(answerer, samples, method)
        right[name] = values.astype(int).tolist()
    return {"right": right}


def inferences(way: str) -> Iterator[tuple[str, Method | None]]:
    """Ways to infer: a model that was trained with λ is asked with its own; the one without, with each of them."""
    yield VANILLA, None
    for lam in LAMBDAS:
        if way in (VANILLA, f"λ = {lam}"):
            yield f"λ = {lam}", PyramidDrop(lam=lam)
    yield "FastV", FastV(layer=2, keep=0.5)


def save(record: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record) + "\n", "utf-8")


# --- The tables -----------------------------------------------------------------------------------------------------


def write_document(record: dict[str, Any]) -> None:
    """The tables of docs/training.md."""
    runs: dict[str, dict[str, Any]] = record["runs"]
    scenes = np.array([sample.cluster for sample in digits_samples("test", record["setting"]["scenes"])])
    replace_between(PAGE, "time", time_lines(runs))
    replace_between(PAGE, "accuracy", accuracy_lines(record["start"], runs, scenes))
    replace_between(PAGE, "kinds", kind_lines(record))


def seeds_of(runs: dict[str, dict[str, Any]], way: str) -> list[dict[str, Any]]:
    return [run for name, run in runs.items() if name.rpartition("/")[0] == way]


def time_lines(runs: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| trained with | a step (CPU s) | ratio | whole training (CPU s) | ratio |", "|---|---|---|---|---|"]
    base: dict[str, float] = {}
    for way in ways():
        step, total = (median(run[key] for run in seeds_of(runs, way)) for key in ("step_seconds", "total_seconds"))
        base = base or {"step": step, "total": total}
        lines.append(f"| {way} | {step:.3f} | {step / base['step']:.2f} | {total:.0f} | {total / base['total']:.2f} |")
    return lines


def accuracy_lines(start: dict[str, Any], runs: dict[str, dict[str, Any]], scenes: Array) -> list[str]:
    lines = [
        "| trained with | inference | exact match (%) | by seed | minus trained without, same inference |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| not at all | {name} | {score(np.array(r), scenes)} | | |" for name, r in start["right"].items()]
    for way in ways():
        for name, _ in inferences(way):
            values = right_by_seed(runs, way, name)
            seeds = ", ".join(f"{100 * mean:.1f}" for mean in values.mean(1))
            compared = ""
            if way != VANILLA:
                compared = with_seeds(values - right_by_seed(runs, VANILLA, name), scenes).signed()
            lines.append(f"| {way} | {name} | {with_seeds(values, scenes)} | {seeds} | {compared} |")
    return lines


def right_by_seed(runs: dict[str, dict[str, Any]], way: str, inference: str) -> Array:
    """(seeds, questions) 1 where the answer was right."""
    return np.array([run["right"][inference] for run in seeds_of(runs, way)], dtype=float)


def with_seeds(values: Array, scenes: Array) -> Score:
    """The mean of (seeds, questions) and an error that counts both draws: the scenes, and the seeds of training."""
    by_scene = score(values.mean(0), scenes)
    by_seed = values.mean(1).std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Score(by_scene.mean, float(np.hypot(by_scene.error, by_seed)), by_scene.count)


def kind_lines(record: dict[str, Any]) -> list[str]:
    """The last kind of question asks for several places at once: where dropping hurts."""
    samples = digits_samples("test", record["setting"]["scenes"])
    rows = np.array([sample.kind == "read_row" for sample in samples])
    lines = ["| trained with | inference | read_row | the five other kinds |", "|---|---|---|---|"]
    starts = {name: np.array([r], dtype=float) for name, r in record["start"]["right"].items()}
    entries = [("not at all", name, values) for name, values in starts.items()]
    entries += [(w, name, right_by_seed(record["runs"], w, name)) for w in ways() for name, _ in inferences(w)]
    for way, name, values in entries:
        lines.append(f"| {way} | {name} | {100 * values[:, rows].mean():.1f} | {100 * values[:, ~rows].mean():.1f} |")
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", action="store_true", help="write the tables from what was measured before")
    parser.add_argument("--save", type=Path, help="leave a model trained without and one trained with PyramidDrop here")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
