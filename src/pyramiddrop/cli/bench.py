"""The verb `bench`: measure vanilla and methods side by side on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pyramiddrop.cli.options import HOW, OUTPUT, WHAT, AsJson, Device, Dtype, Images, Methods
from pyramiddrop.cli.terminal import progress, spinner, stderr, stdout

SUBJECT = "What is measured"
NEW_TOKENS = 32


def bench(
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of a shape, the decoder alone: llava-1.5-7b, qwen2.5-vl-7b, internvl3-8b, ..., or "
            "mid, small, small-16k, tiny, deep. (default: the bundled model)",
            rich_help_panel=SUBJECT,
        ),
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Of a shape: run so many of its layers.", rich_help_panel=SUBJECT)
    ] = None,
    visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a shape's prompt.", rich_help_panel=SUBJECT)
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=4, help="Of a shape's prompt. (default: 64)", rich_help_panel=SUBJECT)
    ] = None,
    pictures: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of a shape's prompt: so many share its visual tokens. (default: 1)", rich_help_panel=SUBJECT
        ),
    ] = None,
    padded: Annotated[
        bool,
        typer.Option("--padded", help="Of a shape's batch: prompts of different lengths.", rich_help_panel=SUBJECT),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of a checkpoint.", rich_help_panel=SUBJECT)
    ] = None,
    image: Images = None,
    prompt: Annotated[str | None, typer.Option(help="The question.", rich_help_panel=WHAT)] = None,
    method: Methods = None,
    train: Annotated[
        bool,
        typer.Option("--train", help="Training steps, with and without checkpointing.", rich_help_panel=HOW),
    ] = False,
    overhead: Annotated[
        bool,
        typer.Option(
            "--overhead",
            help="Count the operations that dropping adds to a prefill and to a decoding step, and time both. "
            "(default shape: deep, 32 layers so narrow that launching is the time)",
            rich_help_panel=HOW,
        ),
    ] = False,
    optimizer: Annotated[
        bool, typer.Option("--optimizer/--no-optimizer", help="Of --train: AdamW steps, too.", rich_help_panel=HOW)
    ] = True,
    lora_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Of --train: LoRA of this rank. (default: all weights)", rich_help_panel=HOW),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, e.g. 1,4.", rich_help_panel=HOW)] = "1",
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to generate. (default: 32)", rich_help_panel=HOW)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count.", rich_help_panel=HOW)] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.", rich_help_panel=HOW)] = 1,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the result into this file.", rich_help_panel=OUTPUT)] = None,
) -> None:
    """Measure what dropping saves on this machine: time to the first token, decoding, memory, KV cache; or training.

    Vanilla and the methods take turns, and what the cost model predicts stands beside what is measured. Without
    --method: pyramiddrop and fastv.
    """
    from pyramiddrop.inference import InputError, user_input
    from pyramiddrop.report.speed_plot import check_plot_path
    from pyramiddrop.speed.bench import BenchOptions, prepare_bench

    _check_kind(train, overhead, optimizer, lora_rank, new_tokens)
    if plot and overhead:
        raise InputError("--plot draws seconds and memory, of which --overhead measures none; leave one of them out")
    if plot:
        with user_input():
            check_plot_path(plot)
    options = BenchOptions(
        shape="deep" if overhead and not (shape or model) else shape,
        num_layers=num_layers,
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        pictures=pictures,
        padded=padded,
        model=model,
        images=tuple(image or ()),
        prompt=prompt,
        methods=tuple(method or ()),
        batches=_batches(batch),
        threads=threads,
        device=device,
        dtype=dtype,
    )
    with spinner(f"preparing {options.shape or model or 'the bundled model'}"):
        ready = prepare_bench(options, lambda reason: stderr().print(reason, soft_wrap=True))
    with progress() as begin:
        tick = begin("measuring", ready.runs(repeats, train))
        if train:
            record = ready.training(repeats, optimizer, tick, lora_rank)
        elif overhead:
            record = ready.overhead(repeats, tick)
        else:
            record = ready.generation(new_tokens or NEW_TOKENS, repeats, tick)
    if plot:
        _draw(record, plot)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        _show(record)


def _batches(text: str) -> tuple[int, ...]:
    from pyramiddrop.inference import InputError

    sizes = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise InputError(f"--batch must be different whole numbers from 1 on, with commas between them; got {text!r}")
    return sizes


def _check_kind(train: bool, overhead: bool, optimizer: bool, lora_rank: int | None, new_tokens: int | None) -> None:
    """Raise InputError for options of another kind of measurement."""
    from pyramiddrop.inference import InputError

    if train and overhead:
        raise InputError("--train and --overhead measure different things; give one of them")
    if (train or overhead) and new_tokens is not None:
        raise InputError(f"--new-tokens means nothing with --{'train' if train else 'overhead'}, which generates none")
    if not train and not optimizer:
        raise InputError("--no-optimizer belongs to --train")
    if not train and lora_rank is not None:
        raise InputError("--lora-rank belongs to --train")


def _draw(record: dict[str, Any], path: Path) -> None:
    from pyramiddrop.inference import user_input
    from pyramiddrop.report.speed_plot import draw_speed

    with user_input(f"cannot draw {path}", (OSError, ValueError)):
        draw_speed(record).savefig(path, facecolor="white")
    stderr().print(f"plot: {path}", soft_wrap=True)


def _show(record: dict[str, Any]) -> None:
    from pyramiddrop.report.tables.speed import speed_heading, speed_notes, speed_tables

    console = stdout()
    for part in (*speed_heading(record), *speed_tables(record), *speed_notes(record)):
        console.print(part)
        console.print()
