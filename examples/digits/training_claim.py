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
from train import Recipe, Trainer
from train import run as run_training
from training_study import StepTimes, open_record, with_seeds, write_data
from transformers import TrainerCallback

from pyramiddrop import remove
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.samples import Sample, digits_samples
from pyramiddrop.evaluation.scores import Array
from pyramiddrop.evaluation.store import write_json
from pyramiddrop.evaluation.tasks import same
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
        run_training(trainer, folder, START_STEPS, every=50)
        model = load_trained(folder / "state.pt")
        to_hugging_face(model).save_pretrained(checkpoint)
        make_processor(model.config).save_pretrained(checkpoint)
    return checkpoint


def measure(start: Path, arms: Sequence[str], seeds: int) -> None:
    """One run after the other, seed by seed; what RESULTS holds already is not done again."""
    setting = {"start_steps": START_STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE, "scenes": SCENES}
    record = open_record(RESULTS, setting)
    samples = test_samples(SCENES)
    if "start" not in record:
        record["start"] = ask(start, [*ASKED], samples)
        write_json(RESULTS, record)
    for seed in SEEDS[:seeds]:
        with tempfile.TemporaryDirectory() as folder:
            data = shuffled(write_data(Path(folder), seed, MORE_STEPS * BATCH), seed)
            for name in arms:
                if f"{name}/{seed}" not in record["runs"]:
                    record["runs"][f"{name}/{seed}"] = one_run(name, seed, start, data, samples)
                    write_json(RESULTS, record)


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
    return {
        **curve.record,
        "step_seconds": round(median(times.seconds), 4),
        "losses": [round(one, 4) for one in losses],
    }


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=Path("runs/early"), help="folder of the early checkpoint")
    parser.add_argument("--document", action="store_true", help="write the tables from what was measured before")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    return parser.parse_args()


# --- The tables -----------------------------------------------------------------------------------------------------


def write_document(record: dict[str, Any]) -> None:
    """The tables of docs/training.md."""
    scenes, kinds = clusters_and_kinds(test_samples(record["setting"]["scenes"]))
    replace_between(PAGE, "claim", claim_lines(record, np.array(scenes)))
    replace_between(PAGE, "claim-kinds", claim_kind_lines(record, np.array(kinds)))
    replace_between(PAGE, "claim-curves", curve_lines(record))


def runs_of(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The runs of an arm, by seed."""
    return [record["runs"][f"{name}/{seed}"] for seed in SEEDS if f"{name}/{seed}" in record["runs"]]


def measured(record: dict[str, Any]) -> list[str]:
    """The arms that have a run for every seed that vanilla has."""
    return [name for name in ARMS if len(runs_of(record, name)) == len(runs_of(record, VANILLA)) > 0]


def step_seconds(record: dict[str, Any], name: str) -> float:
    """CPU seconds of a step of an arm: the median over its seeds, for a busy machine disturbs single runs."""
    return median(run["step_seconds"] for run in runs_of(record, name))


def steps_in(record: dict[str, Any], name: str, seconds: float) -> float:
    """How many steps an arm makes in so many CPU seconds; those after `drop_until` cost what vanilla's do."""
    arm, own = ARMS[name], step_seconds(record, name)
    until = seconds / own if arm.drop_until is None else min(seconds / own, arm.drop_until)
    return until + (seconds - until * own) / step_seconds(record, VANILLA)


def ends(record: dict[str, Any], name: str) -> tuple[float, float]:
    """The steps at which an arm is compared with the end of vanilla's training: as many, and those of as much time."""
    seconds = EQUAL_STEPS * step_seconds(record, VANILLA)
    return EQUAL_STEPS, min(steps_in(record, name, seconds), ARMS[name].steps)


def right_at(record: dict[str, Any], name: str, inference: str, step: float) -> Array | None:
    """(seeds, questions) of an arm after `step` steps, in a straight line between two points of the curve.

    None where the arm was not asked in this way.
    """
    seeds = []
    for run in runs_of(record, name):
        pairs = zip(run["steps"], run["right"], strict=True)
        points = [(at, unpacked(right[inference])) for at, right in pairs if inference in right]
        if not points:
            return None
        before = max((point for point in points if point[0] <= step), default=points[0], key=lambda point: point[0])
        after = min((point for point in points if point[0] >= step), default=points[-1], key=lambda point: point[0])
        share = (step - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
        seeds.append(before[1] + share * (after[1] - before[1]))
    return np.array(seeds)


def claim_lines(record: dict[str, Any], scenes: Array) -> list[str]:
    """Each arm at vanilla's number of steps and at vanilla's CPU time, asked in each way."""
    heads = ["trained with", "a step (CPU s)", "ratio", "inference", "at equal steps", "minus vanilla"]
    heads += ["steps in equal time", "at equal time", "minus vanilla"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, bits in record["start"].items():
        lines.append(f"| not at all | | | {name} | {with_seeds(unpacked(bits)[None], scenes)} | | | | |")
    for name in measured(record):
        own, (equal, timed) = step_seconds(record, name), ends(record, name)
        for inference in inferences(name, ARMS[name].steps):
            cells = [name, f"{own:.3f}", f"{own / step_seconds(record, VANILLA):.2f}", inference]
            cells += compared(record, name, inference, equal, scenes)
            cells += [f"{timed:.0f}", *compared(record, name, inference, timed, scenes)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def compared(record: dict[str, Any], name: str, inference: str, step: float, scenes: Array) -> list[str]:
    """The accuracy of an arm after `step` steps, and its paired difference to vanilla's at its end, asked alike."""
    right, base = (right_at(record, *where) for where in ((name, inference, step), (VANILLA, inference, EQUAL_STEPS)))
    assert right is not None
    difference = "" if base is None or name == VANILLA else with_seeds(right - base, scenes).signed()
    return [str(with_seeds(right, scenes)), difference]


def claim_kind_lines(record: dict[str, Any], kinds: Array) -> list[str]:
    """By group of question, at equal time: one that asks for several places at once, and all others."""
    rows = kinds == "read_row"
    lines = ["| trained with | inference | read_row | the five other kinds |", "|---|---|---|---|"]
    for name in measured(record):
        for inference in inferences(name, ARMS[name].steps):
            right = right_at(record, name, inference, ends(record, name)[1])
            assert right is not None
            parts = f"{100 * right[:, rows].mean():.1f} | {100 * right[:, ~rows].mean():.1f}"
            lines.append(f"| {name} | {inference} | {parts} |")
    return lines


def curve_lines(record: dict[str, Any]) -> list[str]:
    """Learning curves: accuracy without dropping and as trained, means over seeds."""
    points = range(EVERY, MORE_STEPS + 1, EVERY)
    lines = ["| trained with | inference | " + " | ".join(f"{step} steps" for step in points) + " |"]
    lines.append("|---" * (len(points) + 2) + "|")
    for name in measured(record):
        own = name if name in inferences(name, ARMS[name].steps) else "λ = 0.5"
        for inference in dict.fromkeys([VANILLA, own]):
            cells = []
            for step in points:
                right = right_at(record, name, inference, step) if step <= ARMS[name].steps else None
                cells.append("" if right is None else f"{100 * right.mean():.1f}")
            lines.append(f"| {name} | {inference} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
