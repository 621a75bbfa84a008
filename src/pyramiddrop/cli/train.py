"""The verb `train`: train a checkpoint on conversations about pictures, with a method or without."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramiddrop.cli.options import HOW, OUTPUT, AsJson, MethodOptions, OneMethod, with_groups
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
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of the log.", rich_help_panel=OUTPUT)] = 10,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train on conversations about pictures, answers alone supervised, with tokens dropped as in inference.

    One process: `pyramiddrop train ...`; many: `accelerate launch --config_file FILE -m pyramiddrop train ...`.
    """
    from pyramiddrop.inference.errors import user_input

    with user_input("training needs more packages, pip install 'pyramiddrop[train]'", (ImportError,)):
        from pyramiddrop.training.run import TrainOptions

    options = TrainOptions(
        model=model,
        data=data,
        output=output,
        images=images,
        recipe=recipe,
        method=dropping.spec(method),
        epochs=epochs,
        steps=steps,
        batch=batch,
        device_batch=device_batch,
        learning_rate=learning_rate,
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
        stdout().print(f"trained model: {job.options.output}", soft_wrap=True)


def _speaks() -> bool:
    """Of many processes the first one speaks."""
    return os.environ.get("RANK", "0") == "0"
