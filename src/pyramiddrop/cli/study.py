"""The verb `study`: the paper's figures for any model and data."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramiddrop.cli import examples
from pyramiddrop.cli.options import (
    HOW,
    OUTPUT,
    WHAT,
    AnswerOptions,
    AsJson,
    Methods,
    Model,
    Percents,
    QuestionOptions,
    SpreadOptions,
    numbers,
    with_groups,
)
from pyramiddrop.cli.terminal import make_folder, print_json, print_parts, progress, say, spinner, stdout
from pyramiddrop.inference import user_input

if TYPE_CHECKING:
    from pyramiddrop.evaluation.studies.method_studies import MethodStudy
    from pyramiddrop.report.studies.study import Shown

Output = Annotated[
    Path, OUTPUT(help="Folder for the page, the figures and the numbers. A study that was stopped goes on there.")
]

study = typer.Typer()


@study.callback(invoke_without_command=True)
def studies(context: typer.Context) -> None:
    """The paper's figures for any model and data: where visual tokens are redundant, and what dropping costs."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@study.command(cls=SpreadOptions, epilog=examples("redundancy"))
@with_groups
def redundancy(
    *,
    model: Annotated[
        list[str] | None, WHAT(help="Folder or hub name; several in one plot. (default: the bundled one)")
    ] = None,
    name: Annotated[list[str] | None, WHAT(help="What a model is called, one for each.")] = None,
    questions: QuestionOptions,
    layers: Annotated[str | None, HOW(help="Drop before these, e.g. 2,8,16,24. (default: each eighth)")] = None,
    keep: Annotated[str | None, HOW(help="Shares to keep. (default: 0.5,0.25,0.125,0.015625)")] = None,
    answering: AnswerOptions,
    maps: Annotated[int, OUTPUT(min=0, help="Prompts whose attention is drawn.")] = 2,
    output: Output = Path("study-redundancy"),
    as_json: AsJson = False,
) -> None:
    """Where are visual tokens redundant? One drop at every layer and keep ratio (the paper's Figures 1 and 3).

    Measures accuracy if answers are known, and agreement with the full model's answers and next tokens. Also writes a
    profile, from which `pyramiddrop plan --profile` makes a schedule.
    """
    from pyramiddrop.evaluation.studies.redundancy import RedundancyOptions, run_redundancy, study_models
    from pyramiddrop.report.studies.redundancy_report import attention_maps, show_redundancy, write_profiles

    task = questions.task(answered=False)
    options = RedundancyOptions(
        models=study_models(model or (), name or (), task.bundled),
        layers=None if layers is None else numbers("layers", layers, int),
        keep=None if keep is None else numbers("keep", keep, float),
        examples=maps,
        **answering.given,
    )
    make_folder(output)
    with progress() as begin:
        record, examples = run_redundancy(task, options, output, begin)
    looks, why_not = attention_maps(examples)
    profiles = write_profiles(record, output)
    _finish(record, show_redundancy(record, looks), output, as_json)
    for path in profiles:
        say(f"profile for `pyramiddrop plan --profile`: {path}")
    if why_not:
        say(f"no attention maps: {why_not}")


@study.command(cls=SpreadOptions, epilog=examples("tradeoff"))
@with_groups
def tradeoff(
    *,
    questions: QuestionOptions,
    model: Model = None,
    method: Methods = None,
    percent: Percents = None,
    answering: AnswerOptions,
    output: Output = Path("study-tradeoff"),
    as_json: AsJson = False,
) -> None:
    """How accurate are methods at equal cost? Scores over decoder FLOPs (the paper's Figure 4).

    Without --method: pyramiddrop, fastv, uniform and random; without --percent: 40 50 60 70 80.
    """
    from pyramiddrop.evaluation.run import EvalOptions
    from pyramiddrop.evaluation.studies.method_studies import prepare_tradeoff
    from pyramiddrop.report.studies.tradeoff import show_tradeoff

    task = questions.task()
    options = EvalOptions(tuple(method or ()), tuple(percent or ()), model, **answering.given, output=output)
    record = _run(lambda: prepare_tradeoff(task, options))
    _finish(record, show_tradeoff(record), output, as_json)


@study.command(epilog=examples("ablation"))
@with_groups
def ablation(
    *,
    questions: QuestionOptions,
    model: Model = None,
    lam: Annotated[str | None, HOW(help="The λ to try. (default: 0.4,0.5,0.6)")] = None,
    answering: AnswerOptions,
    output: Output = Path("study-ablation"),
    as_json: AsJson = False,
) -> None:
    """What does λ cost and save? PyramidDrop with several λ (the paper's Table 4)."""
    from pyramiddrop.evaluation.run import EvalOptions
    from pyramiddrop.evaluation.studies.method_studies import LAMBDAS, prepare_ablation
    from pyramiddrop.report.studies.ablation import show_ablation

    task = questions.task()
    options = EvalOptions(model=model, **answering.given, output=output)
    lambdas = LAMBDAS if lam is None else numbers("lam", lam, float)
    record = _run(lambda: prepare_ablation(task, lambdas, options))
    _finish(record, show_ablation(record), output, as_json)


def _run(prepare: Callable[[], MethodStudy]) -> dict[str, Any]:
    with spinner("loading the model"):
        prepared = prepare()
    with progress() as begin:
        advance = begin("answering", prepared.evaluator.total)
        return prepared.record(lambda step, count: advance(count))


def _finish(record: dict[str, Any], shown: Shown, output: Path, as_json: bool) -> None:
    """Write the files, and print the tables or the record."""
    from pyramiddrop.report.studies.study import write_study

    record = {**record, "command": shlex.join(["pyramiddrop", *sys.argv[1:]])}
    with user_input(f"cannot write into {output}", (OSError,)):
        page = write_study(output, record["study"], record, shown)
    if as_json:
        print_json({**record, "page": str(page)})
        return
    print_parts([*shown.remarks, *(sheet.table() for sheet in shown.sheets)])
    stdout().print(f"page: {page}", soft_wrap=True)
