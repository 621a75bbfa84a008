"""Trains the reader: picture features are aligned with words, then everything is trained end to end on questions.

    python examples/reader/train_reader.py --out runs/reader --minutes 9              # the bundled model, on one GPU
    python examples/reader/train_reader.py --out runs/reader --minutes 9 --resume     # goes on where it was stopped

The model never sees a dropped token: it is an ordinary ("vanilla") LLaVA. The schedule follows the clock, or with
--steps the number of steps: whatever the speed of the machine, the learning rate ends at zero when the time is over.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reader_data import BLOCK, KIND_NAMES, Batch, Pool, Workers, draw_block, drawn_pool, empty_block
from reader_model import ReaderLlava, reader_config, to_pixels
from safetensors.torch import load_file, save_file
from shared import IGNORE, ModelConfig, make_optimizers, set_rate
from torch import Tensor

from pyramiddrop.evaluation.reader import GROUPS, KINDS
from pyramiddrop.evaluation.reader.canvas import CHANNELS

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ENDING = 10.0  # seconds kept for the last validation and the export
STATE, WEIGHTS, LOG = "state.pt", "weights.safetensors", "log.jsonl"


@dataclass(frozen=True)
class Recipe:
    """What the trained weights depend on, besides the speed of the machine. Shares are of the whole training."""

    seed: int = 0
    align_batch: int = 64
    batch: int = 32
    align: float = 0.12  # the first share: no questions, patch labels only
    plain: float = 0.10  # the next: questions without "ASSISTANT:", answered at their last word
    align_muon_lr: float = 6e-3
    align_adam_lr: float = 3e-3
    muon_lr: float = 2e-3
    adam_lr: float = 1.5e-3
    hold: float = 0.2  # of the part with questions: at three quarters of the rate, until retrieval has been learned
    cooling: float = 0.55  # of it: the last part, in which the rate falls to zero
    grounding: float = 0.3  # the weight of the patch labels beside the questions; it falls to zero
    grounded: float = 0.7  # by this share


class Trainer:
    """The state of a run (model, optimisers, how far it is) and one step of it."""

    def __init__(self, recipe: Recipe, config: ModelConfig, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.config, self.device = recipe, config, device
        self.model = ReaderLlava(config).to(device)
        self.packing = self.model.packing()
        self.step, self.done, self.slowed = 0, 0.0, 1.0
        self.aligning = True
        self.optimizers = self._optimizers()
        self.totals = self._fresh_totals()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """New ones for each of the two parts of training."""
        recipe, named = self.recipe, list(self.model.named_parameters())
        if self.aligning:
            picture_side = ("vision", "linear_1", "linear_2", "embed_tokens")
            named = [(name, parameter) for name, parameter in named if name.startswith(picture_side)]
            return make_optimizers(named, recipe.align_muon_lr, recipe.align_adam_lr)
        return make_optimizers(named, recipe.muon_lr, recipe.adam_lr)

    def advance(self, pool: Pool, done: float) -> None:
        """One step, when the share `done` of the training is over."""
        self.done = done
        if self.aligning and done >= self.recipe.align:
            self.aligning = False
            self.optimizers = self._optimizers()
        if self.aligning:
            self._align(pool)
        else:
            self._answer(pool)
        self.step += 1

    def _align(self, pool: Pool) -> None:
        recipe = self.recipe
        batch = pool.sample(recipe.align_batch, 0)
        with self.autocast():
            losses, right = self.model.alignment_losses(
                self.model.image_features(to_pixels(batch.images)), batch.labels
            )
        self._update(losses.sum(), alignment_rate(self.done / recipe.align))
        self._add(pictures=recipe.align_batch, steps=1, loss=losses.sum(), patches=right)

    def _answer(self, pool: Pool) -> None:
        recipe = self.recipe
        batch = pool.sample(recipe.batch, int(self.done >= recipe.align + recipe.plain))
        grounding = recipe.grounding * max(0.0, 1 - self.done / recipe.grounded)
        with self.autocast():
            loss, right, features = self._loss(batch)
            losses, right_patches = self.model.alignment_losses(features, batch.labels)
        self._update(loss + grounding * losses.sum(), question_rate(recipe, self.done))
        self._add(pictures=recipe.batch, steps=1, loss=loss, patches=right_patches)
        self._count(batch.kinds, right)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, which questions are answered right (B, SLOTS), and the picture features."""
        features = self.model.image_features(to_pixels(batch.images))
        logits = self.model.answer(features, batch.ids.flatten(1).long(), self.packing).float()
        targets = batch.targets.long()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        right = (logits.argmax(-1).view_as(targets) == targets) | (targets == IGNORE)
        return loss, right.all(-1), features

    def _update(self, loss: Tensor, rate: float) -> None:
        set_rate(self.optimizers, rate * self.slowed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> torch.autocast:
        """On a GPU products in bf16, the weights stay in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def validate(self, pool: Pool) -> tuple[dict[str, float], Tensor]:
        """Exact match by group and by kind over a whole pool, and which questions are answered right.

        Every token of an answer must be ranked first, as in greedy decoding.
        """
        right, kinds = [], []
        with eager(), self.autocast():
            for start in range(0, pool.size, self.recipe.batch):
                batch = pool.take(slice(start, start + self.recipe.batch), 1)
                right.append(self._loss(batch)[1])
                kinds.append(batch.kinds)
        answered, asked = torch.cat(right).cpu(), torch.cat(kinds).cpu()
        scores = {}
        for group, names in KINDS.items():
            mine = torch.isin(asked, torch.tensor([KIND_NAMES.index(name) for name in names]))
            scores[group] = answered[mine].float().mean().item() if mine.any() else float("nan")
        for code, name in enumerate(KIND_NAMES):
            if (asked == code).any():
                scores[name] = answered[asked == code].float().mean().item()
        return {name: round(value, 4) for name, value in scores.items()}, answered

    def _fresh_totals(self) -> dict[str, Any]:
        zeros = torch.zeros(len(KIND_NAMES), device=self.device)
        return {"pictures": 0, "steps": 0, "loss": 0.0, "patches": 0.0, "asked": zeros, "right": zeros.clone()}

    def _add(self, **numbers: Any) -> None:
        for name, number in numbers.items():
            self.totals[name] = self.totals[name] + (number.detach() if isinstance(number, Tensor) else number)

    def _count(self, kinds: Tensor, right: Tensor) -> None:
        index = kinds.flatten().long()
        self.totals["asked"].index_add_(0, index, torch.ones_like(index, dtype=torch.float32))
        self.totals["right"].index_add_(0, index, right.flatten().float())

    def report(self) -> dict[str, Any]:
        """The means since the last report; waits for the device."""
        totals, self.totals = self.totals, self._fresh_totals()
        steps = max(1, totals["steps"])
        asked = totals["asked"].clamp(min=1)
        kinds = dict(zip(KIND_NAMES, (totals["right"] / asked).tolist(), strict=True))
        patches = totals["patches"] / steps
        return {
            "step": self.step,
            "done": round(self.done, 4),
            "part": "align"
            if self.aligning
            else "plain"
            if self.done < self.recipe.align + self.recipe.plain
            else "ask",
            "loss": round(float(totals["loss"] / steps), 4),
            "patches": dict(zip(CHANNELS, [round(v, 3) for v in patches.tolist()], strict=True))
            if steps and torch.is_tensor(patches)
            else {},
            "train": {} if self.aligning else {name: round(value, 3) for name, value in kinds.items()},
            "steps": totals["steps"],
            "pictures": totals["pictures"],
        }

    def is_sound(self) -> bool:
        """Whether all weights are numbers."""
        return math.isfinite(sum(parameter.detach().double().sum() for parameter in self.model.parameters()))

    def state(self) -> dict[str, Any]:
        """Everything that a run goes on from."""
        return {
            "recipe": asdict(self.recipe),
            "config": asdict(self.config),
            "step": self.step,
            "done": self.done,
            "slowed": self.slowed,
            "aligning": self.aligning,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`. The sizes of the model must be the same."""
        if state["config"] != asdict(self.config):
            raise SystemExit(f"the state is of a model of other sizes: {state['config']}")
        self.step, self.done, self.slowed = state["step"], state["done"], state["slowed"]
        self.aligning = state["aligning"]
        self.model.load_state_dict(state["model"])
        self.optimizers = self._optimizers()
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def alignment_rate(done: float) -> float:
    """The part of the peak rate in the first part: up soon, down to a twentieth over the last half."""
    return min(1.0, (done + 1e-3) / 0.03, max(0.05, (1 - done) / 0.5))


def question_rate(recipe: Recipe, done: float) -> float:
    """The part of the peak rate: three quarters until retrieval is learned, then full, then down to zero."""
    done = (done - recipe.align) / (1 - recipe.align)
    up = min(1.0, (done + 1e-4) / 0.01)
    held = 0.75 + 0.25 * min(1.0, max(0.0, (done - recipe.hold) / 0.05))
    return min(up, 1.0) * min(held, max(0.005, (1 - done) / recipe.cooling))


@contextmanager
def eager() -> Iterator[None]:
    """Compiled layers run as they are written: validation has other shapes, and is not worth compiling for."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compile_layers(trainer: Trainer, pool: Pool) -> str:
    """Compile one layer of each kind for all; gives how it went. A failure leaves the layers as they are."""
    layers = [*trainer.model.vision.layers, *trainer.model.layers]
    start = time.monotonic()
    try:
        for layer in layers:
            layer.compile(dynamic=False)
        for count in (trainer.recipe.align_batch, trainer.recipe.batch):
            batch = pool.sample(count, 0)
            with trainer.autocast():
                loss = trainer.model.alignment_losses(
                    trainer.model.image_features(to_pixels(batch.images)), batch.labels
                )[0].sum()
                if count == trainer.recipe.batch:
                    loss = loss + trainer._loss(batch)[0]
            loss.backward()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        outcome = "compiled"
    except Exception as error:
        for layer in layers:
            layer._compiled_call_impl = None
        torch._dynamo.reset()
        outcome = f"not compiled: {type(error).__name__}: {str(error)[:300]}"
    trainer.model.zero_grad(set_to_none=True)
    return f"{outcome} ({time.monotonic() - start:.0f} s)"


class Log:
    """Lines of JSON in a file, and the same on the screen."""

    def __init__(self, path: Path, start: float) -> None:
        self.path, self.start = path, start

    def __call__(self, **entry: Any) -> None:
        entry = {"seconds": round(time.monotonic() - self.start, 1), **entry}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """An interruption leaves the old file or the new one."""
    partial = path.with_suffix(".partial")
    write(partial)
    os.replace(partial, path)


def save_weights(trainer: Trainer, path: Path) -> None:
    """The weights alone, in half precision, with the sizes of the model: what `export_reader.py` reads."""
    weights = {name: value.detach().half().contiguous().cpu() for name, value in trainer.model.state_dict().items()}
    about = {"config": json.dumps(asdict(trainer.config)), "recipe": json.dumps(asdict(trainer.recipe))}
    write_atomically(path, lambda partial: save_file(weights, partial, about))


def train(trainer: Trainer, pool: Pool, checking: Pool, log: Log, arguments: argparse.Namespace) -> None:
    """Steps until the time or the steps are over; a report every few seconds, checkpoints, and validation."""
    workers: Workers | None = arguments.pool_workers
    begun, offset = time.monotonic(), trainer.done
    seconds = arguments.minutes * 60 - ENDING - (begun - log.start) if arguments.minutes else 0.0
    report_at = saved_at = checked_at = begun
    good = copy.deepcopy(trainer.state())
    while True:
        now = time.monotonic()
        done = trainer.step / arguments.steps if arguments.steps else offset + (1 - offset) * (now - begun) / seconds
        if done >= 1:
            break
        if workers is None:
            refill(pool, trainer)
        trainer.advance(pool, done)
        if now - report_at < arguments.report_every:
            continue
        entry = trainer.report()
        waited = time.monotonic() - now
        span = time.monotonic() - report_at
        report_at = time.monotonic()
        entry |= {
            "steps_per_s": round(entry.pop("steps") / span, 2),
            "pictures_per_s": round(entry.pop("pictures") / span),
        }
        entry |= {"behind_s": round(waited, 3), "drawn": pool.written}
        if trainer.device.type == "cuda":
            entry["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        if trainer.is_sound() and math.isfinite(entry["loss"]):
            good = copy.deepcopy(trainer.state())
        else:
            slowed = trainer.slowed / 2
            trainer.load(copy.deepcopy(good))
            trainer.slowed = slowed
            entry["restored"] = f"step {trainer.step}, at {slowed:g} of the learning rate"
        if report_at - checked_at > arguments.check_every:
            entry["val"] = trainer.validate(checking)[0]
            checked_at = time.monotonic()
        log(**entry)
        if workers:
            workers.check()
        if report_at - saved_at > arguments.save_every:
            save(trainer, arguments)
            saved_at = time.monotonic()


def save(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """The state to go on from, and the weights."""
    write_atomically(arguments.state / STATE, lambda partial: torch.save(trainer.state(), partial))
    save_weights(trainer, arguments.out / WEIGHTS)


def refill(pool: Pool, trainer: Trainer, count: int = 8) -> None:
    """Without workers: some fresh pictures before each step."""
    block = empty_block(count)
    draw_block("train", trainer.recipe.seed, pool.written // count, block)
    pool.write(block)


def parse_arguments() -> argparse.Namespace:
    cuda = torch.cuda.device_count() > 0  # does not start CUDA: the workers are forked first
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {WEIGHTS} and {LOG}")
    parser.add_argument("--state", type=Path, help=f"folder for {STATE}, to resume from; as --out")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="how long all of it may take")
    length.add_argument("--steps", type=int, help="how many steps instead")
    parser.add_argument("--resume", action="store_true", help=f"go on from {STATE}")
    parser.add_argument("--weights", type=Path, help="begin with the weights of such a file")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="pictures of a step with questions")
    parser.add_argument("--align-batch", type=int, default=Recipe.align_batch, help="pictures of a step without")
    parser.add_argument("--align", type=float, default=Recipe.align, help="share of the training without questions")
    parser.add_argument("--muon-lr", type=float, default=Recipe.muon_lr)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1) if cuda else 0)
    parser.add_argument("--pool", type=int, default=24576 if cuda else 64, help="pictures kept on the device")
    parser.add_argument("--val-pictures", type=int, default=384)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--report-every", type=float, default=8, help="seconds")
    parser.add_argument("--check-every", type=float, default=40, help="seconds between validations")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tower-layers", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    start = time.monotonic()
    arguments = parse_arguments()
    arguments.state = arguments.state or arguments.out
    for folder in (arguments.out, arguments.state):
        folder.mkdir(parents=True, exist_ok=True)
    workers = Workers(arguments.workers, arguments.seed) if arguments.workers else None
    arguments.pool_workers = workers
    log = Log(arguments.out / LOG, start)
    torch.set_float32_matmul_precision("high")
    device = torch.device(arguments.device)
    recipe = Recipe(
        seed=arguments.seed,
        batch=arguments.batch,
        align_batch=arguments.align_batch,
        align=arguments.align,
        muon_lr=arguments.muon_lr,
    )
    trainer = Trainer(recipe, reader_config(arguments.hidden, arguments.layers, arguments.tower_layers), device)
    if arguments.resume:
        trainer.load(torch.load(arguments.state / STATE, weights_only=True, map_location=device))
    if arguments.weights:
        trainer.model.load_state_dict(load_file(arguments.weights))
    pool = Pool(max(BLOCK, arguments.pool // BLOCK * BLOCK), device, arguments.seed)
    checking = drawn_pool("val", 0, arguments.val_pictures, device)
    if workers:
        workers.feed(pool)
        while pool.filled < min(pool.size, 64 * BLOCK):
            time.sleep(0.1)
            workers.check()
    while not workers and pool.filled < pool.size:
        refill(pool, trainer)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    log(event="ready", torch=torch.__version__, parameters=parameters, drawn=pool.written, recipe=asdict(recipe))
    if arguments.compile:
        log(event=compile_layers(trainer, pool))
        trainer.totals = trainer._fresh_totals()
    train(trainer, pool, checking, log, arguments)
    if workers:
        workers.stop()
    scores, _ = trainer.validate(checking)
    save(trainer, arguments)
    log(event="finished", step=trainer.step, val=scores, groups={group: scores[group] for group in GROUPS})


if __name__ == "__main__":
    main()
