"""The verb `train`: train a checkpoint on conversations about pictures, with a method or without."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramiddrop.cli.options import HOW, OUTPUT, AsJson, MethodOptions, OneMethod, numbers, with_groups
from pyramiddrop.cli.terminal import stderr, stdout

if TYPE_CHECKING:
    from pyramiddrop.training.run import TrainingJob, TrainOptions

DATA = "Data"
SHOWN = 5


@with_groups
def train(
    *,
    model: Annotated[str, typer.Option(help="Folder or hub name of a checkpoint.")],
    data: Annotated[
        str,
        typer.Option(
            help="JSON or JSON lines of conversations (LLaVA's, or messages), or a data set's folder or hub name.",
            rich_help_panel=DATA,
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for checkpoints, logs and the trained model.", rich_help_panel=OUTPUT)
    ],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the pictures. (default: where the data is)", rich_help_panel=DATA),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Samples of more tokens are broken; none is cut.", rich_help_panel=DATA),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave broken samples out, and list them.", rich_help_panel=DATA)
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file instead of the checkpoint's.", rich_help_panel=DATA)
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Evaluate with these samples; the best checkpoint is the result.", rich_help_panel=DATA),
    ] = None,
    method: OneMethod = None,
    dropping: MethodOptions,
    recipe: Annotated[
        str,
        typer.Option(
            help="LLaVA's steps: projector alone; then all (but the vision tower), or lora.", rich_help_panel=HOW
        ),
    ] = "all",
    epochs: Annotated[float, typer.Option(min=0, help="Times through the data.", rich_help_panel=HOW)] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="So many steps instead.", rich_help_panel=HOW)] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Samples a step over all devices. (default: the recipe's)", rich_help_panel=HOW),
    ] = None,
    device_batch: Annotated[
        int, typer.Option(min=1, help="Samples that a device runs at once.", rich_help_panel=HOW)
    ] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="The peak. (default: the recipe's)", rich_help_panel=HOW)
    ] = None,
    lr_schedule: Annotated[
        str, typer.Option(help="cosine, linear, constant_with_warmup, ...", rich_help_panel=HOW)
    ] = "cosine",
    warmup: Annotated[
        float | None,
        typer.Option(min=0, help="Steps until the peak; below 1 a share of all. (default: 0.03)", rich_help_panel=HOW),
    ] = None,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.", rich_help_panel=HOW)] = 0.0,
    lora_rank: Annotated[
        int, typer.Option(min=1, help="Of the recipe lora; its alpha is twice as much.", rich_help_panel=HOW)
    ] = 128,
    checkpointing: Annotated[
        bool, typer.Option(help="Compute layers again in the backward pass to save memory.", rich_help_panel=HOW)
    ] = True,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16, ...", rich_help_panel=HOW)
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare batches.", rich_help_panel=HOW)] = 0,
    seed: Annotated[int, typer.Option(help="Of the order and of new weights.", rich_help_panel=HOW)] = 0,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=OUTPUT)
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations with --eval-data.", rich_help_panel=OUTPUT)
    ] = None,
    eval_answers: Annotated[
        int | None,
        typer.Option(min=1, help="So many of --eval-data are answered, too, and counted.", rich_help_panel=OUTPUT),
    ] = None,
    best_by: Annotated[
        str, typer.Option(help="What says which checkpoint is best: loss, exact_match.", rich_help_panel=OUTPUT)
    ] = "loss",
    report_to: Annotated[
        str, typer.Option(help="tensorboard, wandb, ... with commas between them; or none.", rich_help_panel=OUTPUT)
    ] = "tensorboard",
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of the log.", rich_help_panel=OUTPUT)] = 10,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train on conversations about pictures, answers alone supervised, with tokens dropped as in inference.

    `--lam 1.0:0.5` takes λ in a straight line from 1 at the first step to 0.5 at the last.

    One process: `pyramiddrop train ...`; many: `accelerate launch --config_file FILE -m pyramiddrop train ...`.
    """
    from pyramiddrop.inference import user_input

    with user_input("training needs more packages, pip install 'pyramiddrop[train]'", (ImportError,)):
        from pyramiddrop.training.run import TrainOptions

    first_lam, dropping = _curriculum(dropping)
    options = TrainOptions(
        model=model,
        data=data,
        output=output,
        images=images,
        recipe=recipe,
        method=dropping.spec(method),
        first_lam=first_lam,
        epochs=epochs,
        steps=steps,
        batch=batch,
        device_batch=device_batch,
        learning_rate=learning_rate,
        lr_schedule=lr_schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        lora_rank=lora_rank,
        eval_data=eval_data,
        eval_every=eval_every,
        eval_answers=eval_answers,
        best_by=best_by,
        report_to=report_to.split(","),
        max_length=max_length,
        checkpointing=checkpointing,
        skip_broken=skip_broken,
        resume=resume,
        save_every=save_every,
        log_every=log_every,
        seed=seed,
        workers=workers,
        dtype=dtype,
        chat_template=chat_template,
    )
    job = _prepare(options)
    figures = job.run()
    if _speaks():
        _show(job, figures, as_json)


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
    job = prepare_training(options, lambda step: stderr().print(step, soft_wrap=True))
    broken = job.report.broken
    for line in broken[:SHOWN]:
        stderr().print(f"skipped: {line}", soft_wrap=True)
    if broken:
        more = f", {len(broken) - SHOWN} more of them in {job.broken_list}" if len(broken) > SHOWN else ""
        stderr().print(f"{len(broken)} of {len(broken) + job.report.good} samples are broken{more}", soft_wrap=True)
    for line in job.remarks:
        stderr().print(line, soft_wrap=True)
    return job


def _show(job: TrainingJob, figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"output": str(job.options.output), **figures}, indent=2))
    else:
        if "best_step" in figures:
            by = job.options.best_by
            best = "the lowest evaluation loss" if by == "loss" else "the most right answers"
            value = f"{figures[f'best_eval_{by}']:.4g}"
            stdout().print(
                f"the weights are those of step {figures['best_step']}, with {best}, {value}", soft_wrap=True
            )
        stdout().print(f"trained model: {job.options.output}", soft_wrap=True)


def _speaks() -> bool:
    """True in the first of several processes, which prints."""
    return os.environ.get("RANK", "0") == "0"
