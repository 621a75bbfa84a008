"""The verb `eval`: vanilla and methods answer the same questions and are scored side by side."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pyramiddrop.cli.options import (
    HOW,
    METHOD,
    OUTPUT,
    WHAT,
    AnswerOptions,
    AsJson,
    Methods,
    Model,
    OptionGroup,
    Percents,
    QuestionOptions,
    with_groups,
)
from pyramiddrop.cli.terminal import print_result, progress, say, spinner
from pyramiddrop.inference import InputError

if TYPE_CHECKING:
    from pyramiddrop.evaluation.run import EvalOptions
    from pyramiddrop.evaluation.tasks import Task

BUNDLED, PAPER = ("digits", "reader"), "paper"
SUITES = (PAPER, "budgets")
OFFLINE, LMMS = "--tasks digits or reader", "tasks of lmms-eval"
#: The options of each way to use the verb, beside --output and --json.
RUN = {"--limit", "--model", "--method", "--batch", "--device"}
OWN = RUN | {"--percent", "--average-tokens", "--controls", "--rounds", "--max-new-tokens", "--dtype"}
MODES = {
    "--suite": {"--suite", "--results"},
    "--data": OWN | {"--data", "--images", "--metric"},
    OFFLINE: OWN | {"--tasks", "--split", "--seed"},
    LMMS: RUN | {"--tasks"},
}


@dataclass(frozen=True)
class _Suite(OptionGroup):
    suite: Annotated[
        str | None,
        WHAT(
            help="What others printed, beside what was measured: paper, the paper's tables; budgets, methods at equal "
            "numbers of visual tokens."
        ),
    ] = None
    results: Annotated[
        list[Path] | None,
        WHAT(help="Of --suite: what lmms-eval or --tasks measured; one or more files or folders.", metavar="FILE..."),
    ] = None


@dataclass(frozen=True)
class _Compared(OptionGroup):
    model: Model = None
    method: Methods = None
    percent: Percents = None
    average_tokens: Annotated[
        list[float] | None,
        METHOD(
            help="Solve them for so many visual tokens of a layer, on average over the layers; one or more.",
            metavar="TOKENS...",
        ),
    ] = None
    controls: Annotated[
        bool | None,
        METHOD(
            "--controls",
            help="Beside them, at the same budget: random inside and before the decoder (three draws each), uniform, a "
            "smaller picture.",
        ),
    ] = None


@with_groups
def evaluate(
    *,
    questions: QuestionOptions,
    suite: _Suite,
    compared: _Compared,
    answering: AnswerOptions,
    rounds: Annotated[
        int | None, HOW(min=0, help="How often a prefill is timed under each method; 0: never. (default: 5)")
    ] = None,
    output: Annotated[
        Path | None, OUTPUT(help="Keep replies and results in this folder; run again, it goes on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask vanilla and methods the same questions: scores by kind, paired differences, FLOPs, KV cache, time.

    Every score has its standard error, every difference its 95 % interval. With --percent or --average-tokens all
    methods cost the same. Without --method: the one saved beside the checkpoint, or pyramiddrop and fastv.
    """
    timing: dict[str, Any] = {} if rounds is None else {"rounds": rounds}
    given = suite.given | compared.given | timing | questions.given | answering.given
    mode = _mode({f"--{name.replace('_', '-')}": value for name, value in given.items() if value != []})
    if suite.suite is not None:
        _show_suite(suite.suite, [*(suite.results or ()), *([output] if output else [])], as_json)
    elif mode == LMMS:
        _run_benchmarks(questions, answering, compared, output, as_json)
    else:
        from pyramiddrop.evaluation.run import EvalOptions

        with spinner("reading the questions"):
            task = questions.task()
        options = EvalOptions(
            methods=tuple(compared.method or ()),
            percents=tuple(compared.percent or ()),
            average_tokens=tuple(compared.average_tokens or ()),
            controls=bool(compared.controls),
            model=compared.model,
            output=output,
            **timing,
            **answering.given,
        )
        _run(task, options, as_json)


def _mode(given: dict[str, Any]) -> str:
    """The way in which the verb is used; InputError for an option that does not belong to it."""
    mode = next((name for name in ("--suite", "--data") if name in given), OFFLINE)
    if mode == OFFLINE and given.get("--tasks", BUNDLED[0]) not in BUNDLED:
        mode = LMMS
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

    with spinner(f"loading {options.model or 'the bundled model'}"):
        evaluator = Evaluator(task, options)
    with progress() as begin:
        advance = begin("answering", evaluator.total)
        record = evaluation_record(evaluator.run(lambda step, count: advance(count, step)))
    if options.output:
        write_json(options.output / "results.json", record)
    print_result(record, (*eval_heading(record), *eval_tables(record), *eval_notes(record)), as_json)


def _run_benchmarks(
    questions: QuestionOptions, answering: AnswerOptions, compared: _Compared, output: Path | None, as_json: bool
) -> None:
    from pyramiddrop.evaluation.lmms.run import RESULTS, benchmarks_record, run_benchmarks
    from pyramiddrop.evaluation.store import write_json
    from pyramiddrop.report.tables.paper import benchmarks_table

    with redirect_stdout(sys.stderr):  # lmms-eval prints what it likes
        found = run_benchmarks(
            str(questions.tasks).split(","),
            compared.method or [],
            compared.model,
            questions.limit,
            answering.batch or 1,
            answering.device,
            output,
            progress=say,
        )
    if not found:  # one of several processes, and not the first
        return
    record = benchmarks_record(found, compared.model)
    if output:
        write_json(output / RESULTS, record)
    print_result(record, [benchmarks_table(found)], as_json)


def _show_suite(suite: str, measured: list[Path], as_json: bool) -> None:
    from pyramiddrop.evaluation.lmms.run import read_measured
    from pyramiddrop.evaluation.paper.tables import budgets_record, suite_record
    from pyramiddrop.report.tables.paper import budget_tables, suite_tables, tasks_table

    if suite not in SUITES:
        raise InputError(f"--suite must be {' or '.join(SUITES)}; got {suite!r}")
    found = [one for path in measured for one in read_measured(path)]
    record = suite_record(found) if suite == PAPER else budgets_record(found)
    parts = [tasks_table(), *suite_tables(record)] if suite == PAPER else budget_tables(record)
    print_result(record, parts, as_json)
