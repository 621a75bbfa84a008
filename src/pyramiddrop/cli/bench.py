"""The verb `bench`: measure vanilla and methods side by side on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pyramiddrop.cli.options import HOW, OUTPUT, WHAT, AsJson, Device, Dtype, Images, Methods, Panel, with_groups
from pyramiddrop.cli.terminal import print_result, progress, say, spinner
from pyramiddrop.inference import InputError, user_input

SUBJECT = Panel("What is measured")
NEW_TOKENS = 32


@dataclass(frozen=True)
class _Subject:
    shape: Annotated[
        str | None,
        SUBJECT(
            help="Random weights of a shape, the decoder alone: llava-1.5-7b, qwen2.5-vl-7b, internvl3-8b, ..., or "
            "mid, small, small-16k, tiny, deep. (default: the bundled model)"
        ),
    ] = None
    num_layers: Annotated[int | None, SUBJECT(help="Of a shape: run so many of its layers.")] = None
    visual_tokens: Annotated[int | None, SUBJECT(min=1, help="Of a shape's prompt.")] = None
    text_tokens: Annotated[int | None, SUBJECT(min=4, help="Of a shape's prompt. (default: 64)")] = None
    pictures: Annotated[
        int | None, SUBJECT(min=1, help="Of a shape's prompt: so many share its visual tokens. (default: 1)")
    ] = None
    padded: Annotated[bool, SUBJECT("--padded", help="Of a shape's batch: prompts of different lengths.")] = False
    model: Annotated[str | None, SUBJECT(help="Folder or hub name of a checkpoint.")] = None


@dataclass(frozen=True)
class _Measurement:
    train: Annotated[bool, HOW("--train", help="Training steps, with and without checkpointing.")] = False
    overhead: Annotated[
        bool,
        HOW(
            "--overhead",
            help="Count the operations that dropping adds to a prefill and to a decoding step, and time both. "
            "(default shape: deep, 32 layers so narrow that launching is the time)",
        ),
    ] = False
    optimizer: Annotated[bool, HOW("--optimizer/--no-optimizer", help="Of --train: AdamW steps, too.")] = True
    lora_rank: Annotated[int | None, HOW(min=1, help="Of --train: LoRA of this rank. (default: all weights)")] = None
    batch: Annotated[str, HOW(help="Batch sizes, e.g. 1,4.")] = "1"
    new_tokens: Annotated[int | None, HOW(min=1, help="Tokens to generate. (default: 32)")] = None
    repeats: Annotated[int, HOW(min=1, help="Rounds that count.")] = 5
    threads: Annotated[int, HOW(min=1, help="CPU threads.")] = 1
    device: Device = None
    dtype: Dtype = None


@with_groups
def bench(
    *,
    subject: _Subject,
    image: Images = None,
    prompt: Annotated[str | None, WHAT(help="The question.")] = None,
    method: Methods = None,
    how: _Measurement,
    as_json: AsJson = False,
    plot: Annotated[Path | None, OUTPUT(help="Draw the result into this file.")] = None,
) -> None:
    """Measure what dropping saves on this machine: time to the first token, decoding, memory, KV cache; or training.

    Vanilla and the methods take turns, and what the cost model predicts stands beside what is measured. Without
    --method: pyramiddrop and fastv.
    """
    from pyramiddrop.report.speed_plot import check_plot_path, draw_speed
    from pyramiddrop.report.tables.speed import speed_heading, speed_notes, speed_tables
    from pyramiddrop.speed.bench import BenchOptions, prepare_bench

    _check_kind(how)
    if plot and how.overhead:
        raise InputError("--plot draws seconds and memory, of which --overhead measures none; leave one of them out")
    if plot:
        with user_input():
            check_plot_path(plot)
    if how.overhead and not (subject.shape or subject.model):
        subject = replace(subject, shape="deep")
    options = BenchOptions(
        **vars(subject),
        images=tuple(image or ()),
        prompt=prompt,
        methods=tuple(method or ()),
        batches=_batches(how.batch),
        threads=how.threads,
        device=how.device,
        dtype=how.dtype,
    )
    with spinner(f"preparing {options.shape or options.model or 'the bundled model'}"):
        ready = prepare_bench(options, say)
    with progress() as begin:
        tick = begin("measuring", ready.runs(how.repeats, how.train))
        if how.train:
            record = ready.training(how.repeats, how.optimizer, tick, how.lora_rank)
        elif how.overhead:
            record = ready.overhead(how.repeats, tick)
        else:
            record = ready.generation(how.new_tokens or NEW_TOKENS, how.repeats, tick)
    if plot:
        with user_input(f"cannot draw {plot}", (OSError, ValueError)):
            draw_speed(record).savefig(plot, facecolor="white")
        say(f"plot: {plot}")
    print_result(record, [*speed_heading(record), *speed_tables(record), *speed_notes(record)], as_json)


def _batches(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise InputError(f"--batch must be different whole numbers from 1 on, with commas between them; got {text!r}")
    return sizes


def _check_kind(how: _Measurement) -> None:
    """Raise InputError for options of another kind of measurement."""
    if how.train and how.overhead:
        raise InputError("--train and --overhead measure different things; give one of them")
    if (how.train or how.overhead) and how.new_tokens is not None:
        kind = "train" if how.train else "overhead"
        raise InputError(f"--new-tokens means nothing with --{kind}, which generates none")
    if not how.train and not how.optimizer:
        raise InputError("--no-optimizer belongs to --train")
    if not how.train and how.lora_rank is not None:
        raise InputError("--lora-rank belongs to --train")
