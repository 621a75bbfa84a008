"""The verb `plan`: solve the schedule for a budget, and print the Python line that makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramiddrop.cli.options import OUTPUT, AsJson, SizeOptions, with_groups
from pyramiddrop.cli.terminal import spinner, stdout

if TYPE_CHECKING:
    from pyramiddrop.inference.budgets import BudgetOptions
    from pyramiddrop.inference.sizes import Sizes
    from pyramiddrop.planning import MeasuredTimes, Plan

BUDGET, SOLVE = "The budget (exactly one)", "What is solved"
EARLIER = (
    "Equal stages with four drops at most would leave less than 0.4 of the tokens at each, or cannot spend so little: "
    "their first layers see every token. So the drops begin earlier, where the ranking has fewer layers to go by; "
    "try it on your questions (pyramiddrop eval)."
)


@with_groups
def plan(
    *,
    average_tokens: Annotated[
        float | None, typer.Option(help="Visual tokens of a layer, on average.", rich_help_panel=BUDGET)
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOPs of the prefill.", rich_help_panel=BUDGET)] = None,
    percent: Annotated[float | None, typer.Option(help="Percent of vanilla's FLOPs.", rich_help_panel=BUDGET)] = None,
    kv_bytes: Annotated[
        float | None, typer.Option(help="Bytes of KV cache after the prefill.", rich_help_panel=BUDGET)
    ] = None,
    measure: Annotated[
        float | None,
        typer.Option(
            metavar="MILLISECONDS",
            help="Time of the decoder's prefill, its layers measured now on this machine.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    convention: Annotated[
        str, typer.Option(help="How --tflops and --percent count: full, paper or fastv.", rich_help_panel=BUDGET)
    ] = "full",
    stages: Annotated[int | None, typer.Option(help="So many equal stages: solve λ.", rich_help_panel=SOLVE)] = None,
    lam: Annotated[
        float | None, typer.Option(help="This λ: solve the number of equal stages.", rich_help_panel=SOLVE)
    ] = None,
    pyramid: Annotated[
        str | None,
        typer.Option(
            help="Where the drops lie: equal (stages), concave (each at twice the depth of the one before), single, or "
            "hidrop (HiDrop's layers, and none left from its exit on).",
            rich_help_panel=SOLVE,
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="A redundancy profile (JSON): choose layers and shares.", rich_help_panel=SOLVE),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(
            help="A method before the decoder, whose tokens are dropped on inside it: vision:keep=0.5.",
            metavar="METHOD",
            rich_help_panel=SOLVE,
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Instead: every pyramid for the budgets of papers: 192, 128, 64 of 576; 640, 320, 160 of 2880.",
            rich_help_panel=BUDGET,
        ),
    ] = False,
    bench: Annotated[
        Path | None,
        typer.Option(
            help="What `pyramiddrop bench --json` printed for this model and prompt: milliseconds beside FLOPs and KV.",
            metavar="FILE",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    size_options: SizeOptions,
    as_json: AsJson = False,
) -> None:
    """Find the schedule for a budget: layers, keep ratios, costs, and the Python line to use it.

    Without --stages, --lam, --pyramid and --profile: the fewest equal stages, from the paper's 4 on and with at most
    four drops, for which λ is 0.4 or more; if there are none, four drops that begin earlier (concave).
    """
    from pyramiddrop.inference.budgets import BudgetOptions, make_plan, read_times

    sizes = size_options.sizes()
    times = read_times(bench, sizes) if bench else None
    options = BudgetOptions(
        average_tokens, tflops, percent, kv_bytes, measure, convention, stages, lam, pyramid, profile, before
    )
    if published:
        _show_published(options, sizes, times, as_json)
        return
    if measure is None:
        found = make_plan(options, sizes)
    else:
        with spinner("measuring layers"):
            found = make_plan(options, sizes)
    if as_json:
        print(json.dumps({"name": sizes.name, **found.as_dict(), **_measured(times, found)}, indent=2))
    else:
        _show(sizes, found, times, asked=pyramid is not None)


def _measured(times: MeasuredTimes | None, found: Plan) -> dict[str, Any]:
    """The milliseconds of a plan's decoder prefill by bench's record, for JSON."""
    if times is None:
        return {}
    return {
        "milliseconds": times.milliseconds(found.cost),
        "vanilla_milliseconds": times.milliseconds(found.vanilla),
        "interpolation_error": times.error,
        "measured": times.about,
    }


def _show_published(options: BudgetOptions, sizes: Sizes, times: MeasuredTimes | None, as_json: bool) -> None:
    from pyramiddrop.inference import InputError, user_input
    from pyramiddrop.inference.budgets import BudgetOptions
    from pyramiddrop.planning import published_plans
    from pyramiddrop.report.tables.cost import published_table, times_line

    if options != BudgetOptions():
        raise InputError("--published has budgets of its own, and every pyramid for each: leave the other options out")
    with user_input():
        found = published_plans(sizes.shape, sizes.prompt)
    if as_json:
        rows = [
            {"tokens": one.tokens, "pyramid": one.pyramid, "within_reach": one.within_reach, **one.plan.as_dict()}
            | _measured(times, one.plan)
            for one in found
        ]
        print(json.dumps({"name": sizes.name, "plans": rows}, indent=2))
        return
    stdout().print(published_table(found, times))
    stdout().print(f"\n{sizes.about}", soft_wrap=True)
    if times is not None:
        stdout().print(f"\n{times_line(times)}", soft_wrap=True)


def _show(sizes: Sizes, found: Plan, times: MeasuredTimes | None, asked: bool) -> None:
    from pyramiddrop.method_spec import VANILLA
    from pyramiddrop.report.tables.cost import cost_table, stages_table, times_line

    console = stdout()
    names = [part.partition("(")[0] for part in found.line.split(" | ")]
    console.print(f"from pyramiddrop import {', '.join(sorted(names))}\n")
    console.print(f"method = {found.line}\n", soft_wrap=True)
    console.print(stages_table(found))
    console.print(f"\n{sizes.about}\n", soft_wrap=True)
    console.print(cost_table([(VANILLA, found.vanilla), (" | ".join(names), found.cost)], times))
    if times is not None:
        console.print(f"\n{times_line(times, found)}", soft_wrap=True)
    if sizes.remark:
        console.print(f"\n{sizes.remark}", soft_wrap=True)
    if found.pyramid == "concave" and not asked:
        console.print(f"\n{EARLIER}", soft_wrap=True)
    limit, spent, vanilla = map(found.budget.describe, (found.budget.limit, found.spent, found.vanilla_spent))
    console.print(f"\nThe budget is {limit}. This spends {spent}; vanilla, {vanilla}.", soft_wrap=True)
    if found.loss is not None:
        console.print(f"The profile predicts a loss of {found.loss:.4g}.", soft_wrap=True)
