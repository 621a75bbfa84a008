"""The verb `study`: the paper's figures for any model and data."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramiddrop.cli import study_words as words
from pyramiddrop.cli.eval import SeveralMethods
from pyramiddrop.cli.terminal import progress, remarks, results, waiting

if TYPE_CHECKING:
    from pyramiddrop.evaluation.studies.method_studies import MethodStudy
    from pyramiddrop.report.studies.study import Shown

study = typer.Typer()


@study.callback(invoke_without_command=True)
def studies(context: typer.Context) -> None:
    """The paper's figures, of any model and data: where visual tokens are redundant, and what dropping costs."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@study.command()
def redundancy(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or hub name; several in one plot. (default: the bundled one)", rich_help_panel=words.WHAT
        ),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="What a model is called, one for each.", rich_help_panel=words.WHAT)
    ] = None,
    tasks: words.Tasks = None,
    data: words.Data = None,
    images: words.Images = None,
    metric: words.Metric = None,
    split: words.Split = None,
    seed: words.Seed = None,
    limit: words.Limit = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Drop before these, e.g. 2,8,16,24. (default: each eighth)", rich_help_panel=words.HOW),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Shares to keep. (default: 0.5,0.25,0.125,0.015625)", rich_help_panel=words.HOW),
    ] = None,
    batch: words.Batch = 16,
    max_new_tokens: words.MaxNewTokens = 32,
    device: words.Device = None,
    dtype: words.Dtype = None,
    maps: Annotated[
        int, typer.Option(min=0, help="Prompts whose attention is drawn.", rich_help_panel=words.OUTPUT)
    ] = 2,
    output: words.Output = Path("study-redundancy"),
    as_json: words.AsJson = False,
) -> None:
    """Where are visual tokens redundant? One drop at every layer and share (the paper's Figures 1 and 3).

    Accuracy where answers are known; and always how many answers and next tokens stay the full model's.
    Writes a profile, too, from which `pyramiddrop plan --profile` makes a schedule.
    """
    from pyramiddrop.evaluation.studies.inputs import Questions, study_models
    from pyramiddrop.evaluation.studies.redundancy import RedundancyOptions, run_redundancy
    from pyramiddrop.inference.choice import numbers
    from pyramiddrop.report.studies.redundancy_report import attention_maps, show_redundancy, write_profiles

    task = Questions(data, images, metric, split, seed, limit, tasks).task(answered=False)
    options = RedundancyOptions(
        models=study_models(model or (), name or (), task.bundled),
        layers=None if layers is None else numbers("layers", layers, int),
        keep=None if keep is None else numbers("keep", keep, float),
        batch=batch,
        max_new_tokens=max_new_tokens,
        examples=maps,
        device=device,
        dtype=dtype,
    )
    _make_folder(output)
    with progress() as begin:
        record, examples = run_redundancy(task, options, output, begin)
    looks, why_not = attention_maps(examples)
    profiles = write_profiles(record, output)
    _finish(record, show_redundancy(record, looks), output, as_json)
    for path in profiles:
        remarks().print(f"profile for `pyramiddrop plan --profile`: {path}", soft_wrap=True)
    if why_not:
        remarks().print(f"no attention maps: {why_not}", soft_wrap=True)


@study.command(cls=SeveralMethods)
def tradeoff(
    tasks: words.Tasks = None,
    data: words.Data = None,
    images: words.Images = None,
    metric: words.Metric = None,
    split: words.Split = None,
    seed: words.Seed = None,
    limit: words.Limit = None,
    model: words.Model = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="One or more beside vanilla: pyramiddrop:stages=2 fastv:layer=3 ... (default: pyramiddrop, fastv, "
            "uniform and random)",
            metavar="METHOD...",
            rich_help_panel=words.HOW,
        ),
    ] = None,
    percent: Annotated[
        list[float] | None,
        typer.Option(
            help="Of vanilla's decoder FLOPs: every method's shares are solved for each. (default: 40 50 60 70 80)",
            metavar="PERCENT...",
            rich_help_panel=words.HOW,
        ),
    ] = None,
    batch: words.Batch = 16,
    max_new_tokens: words.MaxNewTokens = 32,
    device: words.Device = None,
    dtype: words.Dtype = None,
    output: words.Output = Path("study-tradeoff"),
    as_json: words.AsJson = False,
) -> None:
    """What do methods keep of the answers at equal cost? Scores over decoder FLOPs (the paper's Figure 4)."""
    from pyramiddrop.evaluation.run import EvalOptions
    from pyramiddrop.evaluation.studies.inputs import Questions
    from pyramiddrop.evaluation.studies.method_studies import prepare_tradeoff
    from pyramiddrop.report.studies.tradeoff import show_tradeoff

    task = Questions(data, images, metric, split, seed, limit, tasks).task()
    options = EvalOptions(
        tuple(methods or ()), tuple(percent or ()), model, batch, max_new_tokens, device, dtype, output
    )
    record = _run(lambda: prepare_tradeoff(task, options))
    _finish(record, show_tradeoff(record), output, as_json)


@study.command()
def ablation(
    tasks: words.Tasks = None,
    data: words.Data = None,
    images: words.Images = None,
    metric: words.Metric = None,
    split: words.Split = None,
    seed: words.Seed = None,
    limit: words.Limit = None,
    model: words.Model = None,
    lam: Annotated[
        str | None, typer.Option(help="The λ to try. (default: 0.4,0.5,0.6)", rich_help_panel=words.HOW)
    ] = None,
    batch: words.Batch = 16,
    max_new_tokens: words.MaxNewTokens = 32,
    device: words.Device = None,
    dtype: words.Dtype = None,
    output: words.Output = Path("study-ablation"),
    as_json: words.AsJson = False,
) -> None:
    """What does λ cost, and what does it save? PyramidDrop with several λ (the paper's Table 4)."""
    from pyramiddrop.evaluation.run import EvalOptions
    from pyramiddrop.evaluation.studies.inputs import Questions
    from pyramiddrop.evaluation.studies.method_studies import LAMBDAS, prepare_ablation
    from pyramiddrop.inference.choice import numbers
    from pyramiddrop.report.studies.ablation import show_ablation

    task = Questions(data, images, metric, split, seed, limit, tasks).task()
    options = EvalOptions((), (), model, batch, max_new_tokens, device, dtype, output)
    lambdas = LAMBDAS if lam is None else numbers("lam", lam, float)
    record = _run(lambda: prepare_ablation(task, lambdas, options))
    _finish(record, show_ablation(record), output, as_json)


def _make_folder(output: Path) -> None:
    from pyramiddrop.inference.errors import user_input

    with user_input(f"cannot write into {output}", (OSError,)):
        output.mkdir(parents=True, exist_ok=True)


def _run(prepare: Callable[[], MethodStudy]) -> dict[str, Any]:
    with waiting("loading the model"):
        prepared = prepare()
    with progress() as begin:
        advance = begin("answering", prepared.evaluator.total)
        return prepared.record(lambda step, count: advance(count))


def _finish(record: dict[str, Any], shown: Shown, output: Path, as_json: bool) -> None:
    """Write the files, and print the tables or the record."""
    from pyramiddrop.inference.errors import user_input
    from pyramiddrop.report.studies.files import write_study

    record = {**record, "command": shlex.join(["pyramiddrop", *sys.argv[1:]])}
    with user_input(f"cannot write into {output}", (OSError,)):
        page = write_study(output, record["study"], record, shown)
    if as_json:
        print(json.dumps({**record, "page": str(page)}, indent=2))
        return
    console = results()
    for part in (*shown.remarks, *(sheet.table() for sheet in shown.sheets)):
        console.print(part)
        console.print()
    console.print(f"page: {page}", soft_wrap=True)
