"""Tests the paper's claim on training: from an early checkpoint, at equal steps and at equal time, over seeds.

    python examples/digits/training_claim.py --start runs/early   # stopped? run it again, it goes on
    python examples/digits/training_claim.py --document           # writes the tables of docs/training.md

The start is the bundled model's own training, stopped early (`train.py --stop-at`), so that there is much to learn. The
learning rate is constant after a short warm-up, and so every point of a curve is the end of a training of that length.
All arms see the same questions in the same order; a seed is a set of training scenes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from evaluate import clusters_and_kinds, replace_between
from export import load_trained, make_processor, to_hugging_face
from train import Recipe, Trainer, run
from training_study import StepTimes, with_seeds, write_data
from transformers import TrainerCallback

from pyramiddrop import remove
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.matching import same
from pyramiddrop.evaluation.samples import Sample, digits_samples
from pyramiddrop.evaluation.scores import Array, Score
from pyramiddrop.inference.checkpoint import load_checkpoint
from pyramiddrop.method_spec import parse_method_spec
from pyramiddrop.training.run import TrainOptions, prepare_training

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "digits-training-claim.json"
PAGE = ROOT / "docs" / "training.md"
START_STEPS = 720
SEEDS = (0, 1, 2)
VANILLA = "vanilla"
#: FastV keeps as many rows as λ = 0.5 does on average over the layers (18.6 of 64 after layer 2).
ASKED = {"vanilla": "vanilla", "λ = 0.5": "pyramiddrop:lam=0.5", "FastV": "fastv:layer=2,keep=0.29"}
EVERY, EQUAL_STEPS, MORE_STEPS = 40, 120, 200
BATCH, LEARNING_RATE, WARMUP = 32, 5e-4, 5
SCENES, QUESTIONS_A_SCENE = 30, 16


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        method: in words.
        asked: a further method to ask with, in words, beside those of ASKED.
        steps: of the training: more where a step costs less.
        drop_until: the step from which on no token is dropped; None: never.
    """

    method: str
    asked: str | None = None
    steps: int = MORE_STEPS
    drop_until: int | None = None


ARMS = {
    VANILLA: Arm(VANILLA, steps=EQUAL_STEPS),
    "λ = 0.5": Arm(ASKED["λ = 0.5"]),
    "λ = 0.5, then none": Arm(ASKED["λ = 0.5"], steps=180, drop_until=140),
    "FastV": Arm(ASKED["FastV"]),
    "random": Arm("random:lam=0.5,seed=none", "random:lam=0.5"),
    "λ = 0.4": Arm("pyramiddrop:lam=0.4", "pyramiddrop:lam=0.4"),
    "λ = 0.6": Arm("pyramiddrop:lam=0.6", "pyramiddrop:lam=0.6"),
}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    if not arguments.document:
        measure(start_checkpoint(arguments.start), arguments.arms, arguments.seeds)
    write_document(json.loads(RESULTS.read_text("utf-8")))


def start_checkpoint(folder: Path) -> Path:
    """The bundled model's training until START_STEPS, as a checkpoint in `folder`."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        folder.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(Recipe())
        if (folder / "state.pt").exists():
            trainer.load(folder / "state.pt")
        run(trainer, folder, START_STEPS, 40)
        model = load_trained(folder / "state.pt")
        to_hugging_face(model).save_pretrained(checkpoint)
        make_processor(model.config).save_pretrained(checkpoint)
    return checkpoint


def measure(start: Path, arms: Sequence[str], seeds: int) -> None:
    """One run after the other, seed by seed; what RESULTS holds already is not done again."""
    setting = {"start_steps": START_STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE, "scenes": SCENES}
    record: dict[str, Any] = {"setting": setting, "runs": {}}
    if RESULTS.exists():
        record = json.loads(RESULTS.read_text("utf-8"))
        if record["setting"] != setting:
            raise SystemExit(f"{RESULTS} was measured with {record['setting']}; move it away")
    samples = test_samples(SCENES)
    if "start" not in record:
        record["start"] = ask(start, [*ASKED], samples)
        save(record)
    for seed in SEEDS[:seeds]:
        with tempfile.TemporaryDirectory() as folder:
            data = shuffled(write_data(Path(folder), seed, MORE_STEPS * BATCH), seed)
            for name in arms:
                if f"{name}/{seed}" not in record["runs"]:
                    record["runs"][f"{name}/{seed}"] = one_run(name, seed, start, data, samples)
                    save(record)


def test_samples(scenes: int) -> list[Sample]:
    return digits_samples("test", scenes)


def shuffled(data: Path, seed: int) -> Path:
    """The same records in an order of their own: `write_data` leaves all questions about a picture together."""
    records = json.loads(data.read_text("utf-8"))
    data.write_text(json.dumps([records[i] for i in np.random.default_rng(seed).permutation(len(records))]), "utf-8")
    return data


def one_run(name: str, seed: int, start: Path, data: Path, samples: Sequence[Sample]) -> dict[str, Any]:
    """Train one arm, and ask it at every EVERY-th step."""
    arm = ARMS[name]
    with tempfile.TemporaryDirectory() as folder:
        job = prepare_training(
            TrainOptions(
                model=str(start),
                data=str(data),
                output=Path(folder) / "out",
                method=arm.method,
                steps=arm.steps,
                batch=BATCH,
                device_batch=BATCH,
                learning_rate=LEARNING_RATE,
                lr_schedule="constant_with_warmup",
                warmup=WARMUP,
                checkpointing=False,
                log_every=EVERY,
                seed=seed,
            )
        )
        job.trainer.args.train_sampling_strategy = "sequential"
        times = StepTimes()
        curve = Curve(name, times, samples, Path(folder) / "point")
        for callback in (times, curve):
            job.trainer.add_callback(callback)
        job.trainer.train()
    losses = [entry["loss"] for entry in job.trainer.state.log_history if "loss" in entry]
    return {**curve.record, "step_seconds": round(median(times.seconds), 4), "losses": [round(one, 4) for one in losses]}


class Curve(TrainerCallback):
    """Asks the model while it trains, and takes the method off where its arm says so."""

    def __init__(self, name: str, times: StepTimes, samples: Sequence[Sample], folder: Path) -> None:
        self.name, self.times, self.samples, self.folder = name, times, samples, folder
        self.record: dict[str, Any] = {"steps": [], "seconds": [], "right": []}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        arm, step = ARMS[self.name], state.global_step
        if step % EVERY == 0:
            kwargs["model"].save_pretrained(self.folder)
            kwargs["processing_class"].save_pretrained(self.folder)
            right = ask(self.folder, inferences(self.name, step), self.samples)
            for key, value in (("steps", step), ("seconds", round(sum(self.times.seconds), 2)), ("right", right)):
                self.record[key].append(value)
            said = {name: round(float(unpacked(bits).mean()), 3) for name, bits in right.items()}
            print(time.strftime("%H:%M:%S"), self.name, step, f"{sum(self.times.seconds):.0f} s", said, flush=True)
        if step == arm.drop_until:
            remove(kwargs["model"])


def inferences(name: str, step: int) -> list[str]:
    """Methods to ask with: the common ones, an arm's own, and at the end of vanilla's training those of all arms."""
    own = [f"λ = {lam}" for lam in (0.4, 0.6)] if name == VANILLA and step == EQUAL_STEPS else []
    return [*ASKED, *own, *([name] if ARMS[name].asked else [])]


def ask(checkpoint: Path, names: Sequence[str], samples: Sequence[Sample]) -> dict[str, str]:
    """For each way to infer, a bit for each question (1 where it was right), in hexadecimal digits."""
    answerer = Answerer(load_checkpoint(checkpoint, "cpu"), batch=96, max_new_tokens=5)
    methods = [parse_method_spec(ASKED.get(name) or str(ARMS[name].asked)) for name in names]
    right: dict[str, list[float]] = {name: [] for name in names}
    for first in range(0, len(samples), answerer.batch):
        batch = samples[first : first + answerer.batch]
        for name, replies in zip(names, answerer.answers_by_method(batch, methods), strict=True):
            right[name] += [same(reply.text, sample.answers) for reply, sample in zip(replies, batch, strict=True)]
    return {name: np.packbits(np.array(values, dtype=bool)).tobytes().hex() for name, values in right.items()}


def unpacked(bits: str) -> Array:
    """(questions,) 0 or 1; the number of questions is a multiple of 8."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8)).astype(float)


def save(record: dict[str, Any]) -> None:
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    partial.replace(RESULTS)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=Path("runs/early"), help="folder of the early checkpoint")
    parser.add_argument("--document", action="store_true", help="write the tables from what was measured before")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    return parser.parse_args()


def write_document(record: dict[str, Any]) -> None:
    """The tables of docs/training.md."""


if __name__ == "__main__":
    main()
