"""The verb `eval`: vanilla and methods answer the same questions and are scored side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramiddrop.cli import terminal
from pyramiddrop.cli.generate import SeveralImages
from pyramiddrop.cli.terminal import progress, remarks, waiting

if TYPE_CHECKING:
    from pyramiddrop.evaluation.run import EvalOptions
    from pyramiddrop.evaluation.tasks import Task

WHAT, HOW, OUTPUT = "What is asked", "How", "Output"
BUNDLED, PAPER = ("digits", "reader"), "paper"
OFFLINE = "--tasks digits or reader"
#: The options of each way to use the verb, beside --output and --json.
RUN = {"--limit", "--model", "--methods", "--batch", "--device"}
OWN = RUN | {"--percent", "--average-tokens", "--rounds", "--max-new-tokens", "--dtype"}
MODES = {
    "--suite": {"--suite", "--results"},
    "--data": OWN | {"--data", "--images", "--metric"},
    OFFLINE: OWN | {"--tasks", "--split", "--seed"},
    "tasks of lmms-eval": RUN | {"--tasks"},
}


class SeveralMethods(SeveralImages):
    """Lets `--methods a b` mean `--methods a --methods b`, and the same of the budgets and `--results`."""

    SPREAD = ("--methods", "--percent", "--average-tokens", "--results")


def evaluate(
    tasks: Annotated[
        str | None,
        typer.Option(
            help="digits or reader, the bundled benchmarks, or tasks of lmms-eval: mme,pope. (default: digits)",
            rich_help_panel=WHAT,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Questions of your own: JSON or JSON lines, see docs/evaluation.md.", rich_help_panel=WHAT),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures of --data. (default: its own)", rich_help_panel=WHAT)
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Of --data: exact, same or vqa. (default: exact)", rich_help_panel=WHAT)
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="paper: the paper's benchmarks and figures, beside those that were measured.", rich_help_panel=WHAT
        ),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Of --suite: what lmms-eval or --tasks measured; one or more files or folders.",
            metavar="FILE...",
            rich_help_panel=WHAT,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of digits and reader: test, val or train. (default: test)", rich_help_panel=WHAT)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the pictures of digits and reader. (default: 0)", rich_help_panel=WHAT)
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
    average_tokens: Annotated[
        list[float] | None,
        typer.Option(
            help="Solve them for so many visual tokens of a layer, on average over the layers; one or more.",
            metavar="TOKENS...",
            rich_help_panel=HOW,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Questions of one forward. (default: 16; 1 for lmms-eval)", rich_help_panel=HOW),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. (default: 32)", rich_help_panel=HOW)
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=0, help="How often a prefill is timed under each method; 0: never. (default: 5)", rich_help_panel=HOW
        ),
    ] = None,
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

    Every score has its standard error, every difference its 95 % interval. With --percent or --average-tokens all
    methods cost the same.
    """
    given = {
        "--suite": suite,
        "--results": results,
        "--tasks": tasks,
        "--data": data,
        "--images": images,
        "--metric": metric,
        "--split": split,
        "--seed": seed,
        "--limit": limit,
        "--model": model,
        "--methods": methods,
        "--percent": percent,
        "--average-tokens": average_tokens,
        "--rounds": rounds,
        "--batch": batch,
        "--max-new-tokens": max_new_tokens,
        "--device": device,
        "--dtype": dtype,
    }
    mode = _mode({name: value for name, value in given.items() if value not in (None, [])})
    if mode == "--suite":
        _show_suite(str(suite), [*(results or ()), *([output] if output else [])], as_json)
    elif mode == "tasks of lmms-eval":
        _run_benchmarks(str(tasks), methods or [], model, limit, batch or 1, device, output, as_json)
    else:
        from pyramiddrop.evaluation.run import ROUNDS, EvalOptions
        from pyramiddrop.evaluation.tasks import BUNDLED_TASKS, file_task

        with waiting("reading the questions"):
            task = (
                file_task(data, images, metric or "exact", limit)
                if data
                else BUNDLED_TASKS[tasks or BUNDLED[0]](split or "test", seed or 0, limit)
            )
        options = EvalOptions(
            methods=tuple(methods or ()),
            percents=tuple(percent or ()),
            average_tokens=tuple(average_tokens or ()),
            rounds=ROUNDS if rounds is None else rounds,
            model=model,
            batch=batch or 16,
            max_new_tokens=max_new_tokens or 32,
            device=device,
            dtype=dtype,
            output=output,
        )
        _run(task, options, as_json)


def _mode(given: dict[str, Any]) -> str:
    """The way in which the verb is used; one line about an option that does not belong to it."""
    from pyramiddrop.inference.errors import InputError

    mode = next((name for name in ("--suite", "--data") if name in given), OFFLINE)
    if mode == OFFLINE and given.get("--tasks", BUNDLED[0]) not in BUNDLED:
        mode = "tasks of lmms-eval"
        for name in BUNDLED:
            if name in given["--tasks"].split(","):
                raise InputError(f"{name} is not a task of lmms-eval: give --tasks {name} alone")
    for option in given:
        if option not in MODES[mode]:
            raise InputError(f"{option} means nothing with {mode}")
    return mode


def _run(task: Task, options: EvalOptions, as_json: bool) -> None:
    from pyramiddrop.evaluation.record import evaluation_record
    from pyramiddrop.evaluation.run import Evaluator
    from pyramiddrop.evaluation.store import write_json
    from pyramiddrop.report.tables.evaluation import eval_heading, eval_notes, eval_tables

    with waiting(f"loading {options.model or 'the bundled model'}"):
        evaluator = Evaluator(task, options)
    with progress() as begin:
        advance = begin("answering", evaluator.total)
        record = evaluation_record(evaluator.run(lambda step, count: advance(count, step)))
    if options.output:
        write_json(options.output / "results.json", record)
    _show(record, (*eval_heading(record), *eval_tables(record), *eval_notes(record)), as_json)


def _run_benchmarks(
    tasks: str,
    methods: list[str],
    model: str | None,
    limit: int | None,
    batch: int,
    device: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    from pyramiddrop.evaluation.benchmarks import RESULTS, benchmarks_record, run_benchmarks
    from pyramiddrop.evaluation.store import write_json
    from pyramiddrop.report.tables.paper import benchmarks_table

    with redirect_stdout(sys.stderr):  # lmms-eval prints what it likes
        found = run_benchmarks(tasks.split(","), methods, model, limit, batch, device, output, progress=remarks().print)
    if not found:  # one of several processes, and not the first
        return
    record = benchmarks_record(found, model)
    if output:
        write_json(output / RESULTS, record)
    _show(record, [benchmarks_table(found)], as_json)


def _show_suite(suite: str, measured: list[Path], as_json: bool) -> None:
    from pyramiddrop.evaluation.benchmarks import read_measured
    from pyramiddrop.evaluation.paper.tables import suite_record
    from pyramiddrop.inference.errors import InputError
    from pyramiddrop.report.tables.paper import suite_tables, tasks_table

    if suite != PAPER:
        raise InputError(f"--suite must be {PAPER}; got {suite!r}")
    record = suite_record([one for path in measured for one in read_measured(path)])
    _show(record, [tasks_table(), *suite_tables(record)], as_json)


def _show(record: dict[str, Any], parts: Iterable[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(record, indent=2))
        return
    console = terminal.results()
    for part in parts:
        console.print(part)
        console.print()
