"""Trains the bundled digits model: picture features are aligned with words, then everything is trained end to end.

    python examples/digits/train.py --out runs/digits              # the bundled model
    python examples/digits/train.py --out runs/digits --resume     # goes on where it was stopped, to the same weights

The model never sees a dropped token: it is an ordinary ("vanilla") LLaVA.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model import ModelConfig, PackedLlava
from numpy.typing import NDArray
from optimizer import make_optimizers, set_rate
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from text import BOS, COLUMNS, DIGITS, IGNORE, NOTHING, ROWS, TOKEN_ID, USER, VOCABULARY, QuestionTokens
from torch import Tensor

from pyramiddrop.evaluation.digits import (
    COLOUR_NAMES,
    EMPTY,
    GRID,
    KIND_NAMES,
    QuestionBatch,
    SceneBatch,
    SceneGenerator,
    SceneStyle,
    draw_questions,
)

ALIGN, QUESTIONS, VALIDATE = 0, 1, 2  # the streams of random numbers
WEIGHTS = {"digit_at": 1.2, "colour_at": 0.8, "colour_of": 1.2, "digit_of": 1.0, "row_of": 0.7, "read_row": 1.5}
LATE_WEIGHTS = {"digit_at": 1.2, "colour_at": 0.6, "colour_of": 0.8, "digit_of": 1.0, "row_of": 1.0, "read_row": 2.4}
CROWDED = SceneStyle(fewest=32, most=48, clutter=0.5)


@dataclass(frozen=True)
class Recipe:
    """Everything that the trained weights depend on."""

    seed: int = 0
    align_steps: int = 120
    align_scenes: int = 24
    steps: int = 3300
    plain_steps: int = 500  # of these, the first ones: questions without "ASSISTANT:", answered at their last word
    scenes: int = 8
    questions: int = 32
    muon_lr: float = 3e-3
    adam_lr: float = 2e-3
    warmup: int = 40
    hold: int = 400  # steps at half the learning rate, until retrieval has been learned
    rise: int = 200  # steps from there to the full rate
    cooling: float = 0.5  # the last part of training, in which the rate falls to zero
    filling: int = 300  # steps until scenes are as full as in the benchmark


class Trainer:
    """The state of a run (model, optimisers, steps done) and one step of it."""

    def __init__(self, recipe: Recipe, config: ModelConfig | None = None) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.config = config or ModelConfig(len(VOCABULARY))
        self.model = PackedLlava(self.config, start=[TOKEN_ID[BOS], TOKEN_ID[USER]])
        self.tokens = QuestionTokens()
        self.plain_tokens = QuestionTokens(suffix="")
        self.generator = SceneGenerator("train")
        self.step = 0
        self.optimizers = self._optimizers()

    @property
    def total_steps(self) -> int:
        return self.recipe.align_steps + self.recipe.steps

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """New ones for each of the two parts of training."""
        named = list(self.model.named_parameters())
        if self.step < self.recipe.align_steps:
            picture_side = ("vision", "linear_1", "linear_2", "embed_tokens")
            return make_optimizers([(n, p) for n, p in named if n.startswith(picture_side)], 8e-3, 3e-3)
        return make_optimizers(named, self.recipe.muon_lr, self.recipe.adam_lr)

    def advance(self) -> dict[str, float]:
        """One step; gives what the log says about it."""
        aligning = self.step < self.recipe.align_steps
        if self.step == self.recipe.align_steps:
            self.optimizers = self._optimizers()
        metrics = self._align() if aligning else self._answer()
        self.step += 1
        return metrics

    def _align(self) -> dict[str, float]:
        generator, recipe = self.generator, self.recipe
        scenes = generator.scenes(generator.rng(recipe.seed, ALIGN, self.step), recipe.align_scenes, CROWDED)
        loss = alignment_loss(self.model, scenes)
        self._update(loss, linear_rate(self.step / recipe.align_steps, 0.03, 0.4))
        return {"loss": loss.item()}

    def _answer(self) -> dict[str, float]:
        generator, recipe = self.generator, self.recipe
        step = self.step - recipe.align_steps
        rng = generator.rng(recipe.seed, QUESTIONS, step)
        style = SceneStyle().scaled(min(1.0, (step + 1) / recipe.filling))
        scenes = generator.scenes(rng, recipe.scenes, style)
        weights = LATE_WEIGHTS if step >= recipe.steps * (1 - recipe.cooling) else WEIGHTS
        questions = draw_questions(rng, scenes, recipe.questions, weights, read_lengths=(1, 2, 3))
        tokens = self.plain_tokens if step < recipe.plain_steps else self.tokens
        loss, right = self._loss(scenes, questions, tokens)
        self._update(loss, learning_rate(recipe, step))
        return {"loss": loss.item(), **by_kind(questions.kinds, right)}

    def _loss(
        self, scenes: SceneBatch, questions: QuestionBatch, tokens: QuestionTokens
    ) -> tuple[Tensor, NDArray[Any]]:
        ids, labels = (torch.from_numpy(array) for array in tokens(questions))
        packing = self.model.packing(self.recipe.questions, tokens.width)
        logits = self.model(to_pixels(scenes), ids.flatten(1), packing)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        right = (logits.argmax(-1).view_as(labels) == labels) | (labels == IGNORE)
        return loss, right.all(-1).numpy()

    def _update(self, loss: Tensor, rate: float) -> None:
        set_rate(self.optimizers, rate)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def validate(self, batches: int = 6) -> dict[str, float]:
        """Exact match by kind on validation scenes. Every answer token must be ranked first, as in greedy decoding."""
        generator, total = SceneGenerator("val"), Mean()
        for index in range(batches):
            rng = generator.rng(VALIDATE, index)
            scenes = generator.scenes(rng, self.recipe.scenes)
            questions = draw_questions(rng, scenes, self.recipe.questions)
            total.add(by_kind(questions.kinds, self._loss(scenes, questions, self.tokens)[1]))
        return total.values()

    def save(self, path: Path) -> None:
        """The whole state, written so that an interruption leaves the old file or the new one."""
        state = {
            "recipe": asdict(self.recipe),
            "config": asdict(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """The state of :meth:`save`. The recipe must be the same, but for the number of steps."""
        state = torch.load(path, weights_only=True)
        if replace(Recipe(**state["recipe"]), steps=self.recipe.steps) != self.recipe:
            raise SystemExit(f"{path} was made with another recipe: {state['recipe']}")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        finished_aligning = self.step == self.recipe.align_steps
        self.step -= finished_aligning  # the state at the border still holds the first part's optimisers
        self.optimizers = self._optimizers()
        self.step += finished_aligning
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def alignment_loss(model: PackedLlava, scenes: SceneBatch) -> Tensor:
    """Each picture feature should look like the words for its digit, its colour, its row and its column."""
    features = F.rms_norm(model.image_features(to_pixels(scenes)), (model.config.hidden,)).flatten(0, 1)
    digits, colours = (torch.from_numpy(a).flatten() for a in (scenes.digits, scenes.colours))
    place = torch.arange(GRID * GRID).repeat(len(scenes.digits))
    targets = [
        ((*DIGITS, NOTHING), torch.where(digits == EMPTY, len(DIGITS), digits)),
        ((*COLOUR_NAMES, NOTHING), torch.where(colours == EMPTY, len(COLOUR_NAMES), colours)),
        (ROWS, place // GRID),
        (COLUMNS, place % GRID),
    ]
    loss = features.new_zeros(())
    for words, target in targets:
        embeddings = model.embed_tokens.weight[[TOKEN_ID[word] for word in words]]
        loss = loss + F.cross_entropy(features @ embeddings.T * (2 / model.config.hidden**0.5), target)
    return loss


def to_pixels(scenes: SceneBatch) -> Tensor:
    """(B, 3, 80, 80) in [-1, 1], as the exported image processor gives them."""
    return (torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def linear_rate(done: float, warmup: float, cooling: float) -> float:
    """Up within ``warmup``, constant, down to zero over the last ``cooling``; all as parts of the whole."""
    return min(1.0, (done + 1e-3) / warmup, max(0.01, (1 - done) / cooling))


def learning_rate(recipe: Recipe, step: int) -> float:
    """The part of the peak rate: up to a half until retrieval is learned, then full, then down to zero."""
    up = min(1.0, (step + 5) / recipe.warmup)
    half_to_full = 0.5 + 0.5 * min(1.0, max(0.0, (step - recipe.hold) / recipe.rise))
    down = max(0.01, (1 - step / recipe.steps) / recipe.cooling)
    return min(up, half_to_full, down)


def by_kind(kinds: NDArray[Any], right: NDArray[Any]) -> dict[str, float]:
    return {name: float(right[kinds == kind].mean()) for kind, name in enumerate(KIND_NAMES) if (kinds == kind).any()}


class Mean:
    """Means of named numbers."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self.sums.setdefault(name, []).append(number)

    def values(self) -> dict[str, float]:
        return {name: round(sum(numbers) / len(numbers), 4) for name, numbers in self.sums.items()}


def run(trainer: Trainer, out: Path, until: int, every: int) -> None:
    """Train to step ``until``, with a bar, a log of JSON lines, and a checkpoint every ``every`` steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    mean, cpu = Mean(), time.process_time()
    with (out / "log.jsonl").open("a") as log, Progress(*columns) as progress:
        bar = progress.add_task("training", total=trainer.total_steps, completed=trainer.step)
        while trainer.step < until:
            mean.add(trainer.advance())
            progress.update(bar, completed=trainer.step)
            if trainer.step % 50 == 0 or trainer.step == until:
                line: dict[str, Any] = {"step": trainer.step, "train": mean.values()}
                mean = Mean()
                if trainer.step % every == 0 or trainer.step == until:
                    line["val"] = trainer.validate()
                    trainer.save(out / "state.pt")
                line["cpu_seconds"] = round(time.process_time() - cpu, 1)
                log.write(json.dumps(line) + "\n")
                log.flush()
                progress.update(bar, description=f"loss {line['train']['loss']:.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for state.pt and log.jsonl")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="steps after the alignment")
    parser.add_argument("--stop-at", type=int, help="stop early, at this step of the same schedule")
    parser.add_argument("--every", type=int, default=200, help="steps between two checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(Recipe(seed=arguments.seed, steps=arguments.steps))
    if arguments.resume:
        trainer.load(arguments.out / "state.pt")
    run(trainer, arguments.out, min(arguments.stop_at or trainer.total_steps, trainer.total_steps), arguments.every)


if __name__ == "__main__":
    main()
