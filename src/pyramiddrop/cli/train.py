"""The verb `train`: train a checkpoint on conversations about pictures, with a method or without."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from pyramiddrop.cli.options import HOW, OUTPUT, AsJson, MethodOptions, OneMethod, Panel, numbers, with_groups
from pyramiddrop.cli.terminal import print_json, say, stderr, stdout
from pyramiddrop.inference import user_input

if TYPE_CHECKING:
    from pyramiddrop.training.run import TrainingJob, TrainOptions

DATA = Panel("Data")
SHOWN = 5


@dataclass(frozen=True)
class _Data:
    data: Annotated[
        str,
        DATA(help="JSON or JSON lines of conversations (LLaVA's, or messages), or a data set's folder or hub name."),
    ]
    images: Annotated[Path | None, DATA(help="Folder of the pictures. (default: where the data is)")] = None
    max_length: Annotated[int | None, DATA(min=2, help="Samples of more tokens are broken; none is cut.")] = None
    skip_broken: Annotated[bool, DATA("--skip-broken", help="Leave broken samples out, and list them.")] = False
    chat_template: Annotated[Path | None, DATA(help="A Jinja file instead of the checkpoint's.")] = None
    eval_data: Annotated[str | None, DATA(help="Evaluate with these samples; the best checkpoint is the result.")] = (
        None
    )


@dataclass(frozen=True)
class _Output:
    output: Annotated[Path, OUTPUT(help="Folder for checkpoints, logs and the trained model.")]
    save_every: Annotated[int | None, OUTPUT(min=1, help="Steps between checkpoints.")] = None
    eval_every: Annotated[int | None, OUTPUT(min=1, help="Steps between evaluations with --eval-data.")] = None
    eval_answers: Annotated[
        int | None, OUTPUT(min=1, help="So many of --eval-data are answered, too, and counted.")
    ] = None
    best_by: Annotated[str, OUTPUT(help="What says which checkpoint is best: loss, exact_match.")] = "loss"
    report_to: Annotated[str, OUTPUT(help="tensorboard, wandb, ... with commas between them; or none.")] = "tensorboard"
    log_every: Annotated[int, OUTPUT(min=1, help="Steps between lines of the log.")] = 10
    resume: Annotated[bool, OUTPUT("--resume", help="Go on from the last whole checkpoint.")] = False


@dataclass(frozen=True)
class _Recipe:
    recipe: Annotated[str, HOW(help="LLaVA's steps: projector alone; then all (but the vision tower), or lora.")] = (
        "all"
    )
    epochs: Annotated[float, HOW(min=0, help="Times through the data.")] = 1.0
    steps: Annotated[int | None, HOW(min=1, help="So many steps instead.")] = None
    batch: Annotated[int | None, HOW(min=1, help="Samples a step over all devices. (default: the recipe's)")] = None
    device_batch: Annotated[int, HOW(min=1, help="Samples that a device runs at once.")] = 1
    learning_rate: Annotated[float | None, HOW(min=0, help="The peak. (default: the recipe's)")] = None
    lr_schedule: Annotated[str, HOW(help="cosine, linear, constant_with_warmup, ...")] = "cosine"
    warmup: Annotated[
        float | None, HOW(min=0, help="Steps until the peak; below 1 a share of all. (default: 0.03)")
    ] = None
    weight_decay: Annotated[float, HOW(min=0, help="Of AdamW.")] = 0.0
    lora_rank: Annotated[int, HOW(min=1, help="Of the recipe lora; its alpha is twice as much.")] = 128
    checkpointing: Annotated[bool, HOW(help="Compute layers again in the backward pass to save memory.")] = True
    dtype: Annotated[str | None, HOW(help="Of the weights: float32, bfloat16, ...")] = None
    workers: Annotated[int, HOW(min=0, help="Processes that prepare batches.")] = 0
    seed: Annotated[int, HOW(help="Of the order and of new weights.")] = 0


@with_groups
def train(
    *,
    model: Annotated[str, Option(help="Folder or hub name of a checkpoint.")],
    data: _Data,
    writing: _Output,
    method: OneMethod = None,
    dropping: MethodOptions,
    recipe: _Recipe,
    as_json: AsJson = False,
) -> None:
    """Train on conversations about pictures, answers alone supervised, with tokens dropped as in inference.

    `--lam 1.0:0.5` takes λ in a straight line from 1 at the first step to 0.5 at the last.

    One process: `pyramiddrop train ...`; many: `accelerate launch --config_file FILE -m pyramiddrop train ...`.
    """
    with user_input("training needs more packages, pip install 'pyramiddrop[train]'", (ImportError,)):
        from pyramiddrop.training.run import TrainOptions

    first_lam, dropping = _curriculum(dropping)
    given = vars(data) | vars(writing) | vars(recipe) | {"report_to": writing.report_to.split(",")}
    job = _prepare(TrainOptions(model, method=dropping.spec(method), first_lam=first_lam, **given))
    figures = job.run()
    if not _speaks():
        return
    if as_json:
        print_json({"output": str(job.options.output), **figures})
        return
    if "best_step" in figures:
        by = job.options.best_by
        best = "the lowest evaluation loss" if by == "loss" else "the most right answers"
        value = f"{figures[f'best_eval_{by}']:.4g}"
        stdout().print(f"the weights are those of step {figures['best_step']}, with {best}, {value}", soft_wrap=True)
    stdout().print(f"trained model: {job.options.output}", soft_wrap=True)


def _curriculum(dropping: MethodOptions) -> tuple[float | None, MethodOptions]:
    """The first λ of `--lam FIRST:LAST` (None for a constant λ), and the options with the last one."""
    first, colon, last = (dropping.lam or "").partition(":")
    if not colon:
        return None, dropping
    return numbers("lam", first, float)[0], replace(dropping, lam=last)


def _prepare(options: TrainOptions) -> TrainingJob:
    from datasets import disable_progress_bars

    from pyramiddrop.training.run import prepare_training

    if not (_speaks() and stderr().is_terminal):
        disable_progress_bars()
    if not _speaks():
        return prepare_training(options)
    job = prepare_training(options, say)
    broken = job.report.broken
    for line in broken[:SHOWN]:
        say(f"skipped: {line}")
    if broken:
        more = f", {len(broken) - SHOWN} more of them in {job.broken_list}" if len(broken) > SHOWN else ""
        say(f"{len(broken)} of {len(broken) + job.report.good} samples are broken{more}")
    for line in job.remarks:
        say(line)
    return job


def _speaks() -> bool:
    """True in the first of several processes, which prints."""
    return os.environ.get("RANK", "0") == "0"
