"""Owns the verb `eval`: vanilla and methods answer the same questions, and are scored side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramiddrop.cli.generate import SeveralImages
from pyramiddrop.cli.terminal import remarks, results, waiting

if TYPE_CHECKING:
    from pyramiddrop.evaluation.tasks import Task

WHAT, HOW, OUTPUT = "What is asked", "How", "Output"
DIGITS = "digits"


class SeveralMethods(SeveralImages):
    """Lets `--methods a b` mean `--methods a --methods b`, and the same of `--percent`."""

    SPREAD = ("--methods", "--percent")


def evaluate(
    tasks: Annotated[
        str | None,
        typer.Option(help="digits, the bundled benchmark. (default: digits)", rich_help_panel=WHAT),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Questions of your own: JSON or JSON lines, see docs/evaluation.md.", rich_help_panel=WHAT),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures of --data. (default: its own)", rich_help_panel=WHAT)
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Of --data: exact or vqa. (default: exact)", rich_help_panel=WHAT)
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of digits: test, val or train. (default: test)", rich_help_panel=WHAT)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the scenes of digits. (default: 0)", rich_help_panel=WHAT)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask so many questions at most.", rich_help_panel=WHAT)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a checkpoint. (default: the bundled one)", rich_help_panel=HOW),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="One or more beside vanilla: pyramiddrop:lam=0.6 fastv:layer=2,keep=0.4 ... (default: the saved one, "
            "or pyramiddrop and fastv)",
            metavar="METHOD...",
            rich_help_panel=HOW,
        ),
    ] = None,
    percent: Annotated[
        list[float] | None,
        typer.Option(
            help="Solve the shares of every method for so much of vanilla's decoder FLOPs; one or more.",
            metavar="PERCENT...",
            rich_help_panel=HOW,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions of one forward.", rich_help_panel=HOW)] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=HOW)] = 32,
    device: Annotated[
        str | None, typer.Option(help="cuda, mps or cpu. (default: the best there is)", rich_help_panel=HOW)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16, bfloat16, auto. (default: fits the device)", rich_help_panel=HOW),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Keep replies and results in this folder; run again, it goes on.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Ask vanilla and methods the same questions: scores by kind, paired differences, FLOPs, KV cache, time.

    Every score has its standard error, every difference its 95 % interval. With --percent all methods cost the same.
    """
    from pyramiddrop.evaluation.record import evaluation_record
    from pyramiddrop.evaluation.run import EvalOptions, Evaluator
    from pyramiddrop.evaluation.store import write_json

    with waiting("reading the questions") as step:
        task = _task(tasks, data, images, metric, split, seed, limit)
        step(f"loading {model or 'the bundled model'}")
        options = EvalOptions(
            tuple(methods or ()), tuple(percent or ()), model, batch, max_new_tokens, device, dtype, output
        )
        evaluator = Evaluator(task, options)
    with _progress(evaluator.total) as progress:
        record = evaluation_record(evaluator.run(progress))
    if output:
        write_json(output / "results.json", record)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        _show(record)


def _task(
    tasks: str | None,
    data: Path | None,
    images: Path | None,
    metric: str | None,
    split: str | None,
    seed: int | None,
    limit: int | None,
) -> Task:
    from pyramiddrop.evaluation.tasks import digits_task, file_task
    from pyramiddrop.inference.errors import InputError

    own, bundled = {"--images": images, "--metric": metric}, {"--tasks": tasks, "--split": split, "--seed": seed}
    for option, value in (bundled if data else own).items():
        if value is not None:
            raise InputError(f"{option} {'means nothing with' if data else 'belongs to'} --data")
    if data:
        return file_task(data, images, metric or "exact", limit)
    if tasks not in (None, DIGITS):
        raise InputError(f"task {tasks!r} is not one of {DIGITS}")
    return digits_task(split or "test", seed or 0, limit)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on the terminal's standard error; yields what says what is done, and moves it on by some questions."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = remarks()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("answering", total=total)
        yield lambda step, count: bar.update(task, description=step, advance=count)


def _show(record: dict[str, Any]) -> None:
    from pyramiddrop.report.eval_tables import eval_heading, eval_notes, eval_tables

    console = results()
    for part in (*eval_heading(record), *eval_tables(record), *eval_notes(record)):
        console.print(part)
        console.print()
