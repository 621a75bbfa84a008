"""The verb `plan`: solve the schedule for a budget, and print the Python line that makes it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pyramiddrop.cli.options import OUTPUT, AsJson, Panel, SizeOptions, with_groups
from pyramiddrop.cli.terminal import print_json, spinner, stdout
from pyramiddrop.inference import InputError, user_input

if TYPE_CHECKING:
    from pyramiddrop.inference.sizes import Sizes
    from pyramiddrop.planning import MeasuredTimes, Plan

BUDGET, SOLVED = Panel("The budget (exactly one)"), Panel("What is solved")
EARLIER = (
    "Equal stages with four drops at most would leave less than 0.4 of the tokens at each, or cannot spend so little: "
    "their first layers see every token. So the drops begin earlier, where the ranking has fewer layers to go by; "
    "try it on your questions (pyramiddrop eval)."
)


@dataclass(frozen=True)
class _Budget:
    average_tokens: Annotated[float | None, BUDGET(help="Visual tokens of a layer, on average.")] = None
    tflops: Annotated[float | None, BUDGET(help="TFLOPs of the prefill.")] = None
    percent: Annotated[
        float | None,
        BUDGET(help="Percent of vanilla's FLOPs, by the --convention; full counts the vision encoder, too."),
    ] = None
    kv_bytes: Annotated[float | None, BUDGET(help="Bytes of KV cache after the prefill.")] = None
    measure: Annotated[
        float | None,
        BUDGET(metavar="MILLISECONDS", help="Time of the decoder's prefill, its layers measured now on this machine."),
    ] = None
    convention: Annotated[str, BUDGET(help="How --tflops and --percent count: full, paper or fastv.")] = "full"


@dataclass(frozen=True)
class _Solved:
    stages: Annotated[int | None, SOLVED(help="So many equal stages: solve λ.")] = None
    lam: Annotated[float | None, SOLVED(help="This λ: solve the number of equal stages.")] = None
    pyramid: Annotated[
        str | None,
        SOLVED(
            help="Where the drops lie: equal (stages), concave (each at twice the depth of the one before), single, or "
            "hidrop (HiDrop's layers, and none left from its exit on)."
        ),
    ] = None
    profile: Annotated[Path | None, SOLVED(help="A redundancy profile (JSON): choose layers and shares.")] = None
    before: Annotated[
        str | None,
        SOLVED(
            help="A method before the decoder, whose tokens are dropped on inside it: vision:keep=0.5.",
            metavar="METHOD",
        ),
    ] = None


@with_groups
def plan(
    *,
    budget: _Budget,
    solved: _Solved,
    published: Annotated[
        bool,
        BUDGET(
            "--published",
            help="Instead: every pyramid for the budgets of papers: 192, 128, 64 of 576; 640, 320, 160 of 2880.",
        ),
    ] = False,
    bench: Annotated[
        Path | None,
        OUTPUT(
            help="What `pyramiddrop bench --json` printed for this model and prompt: milliseconds beside FLOPs and KV.",
            metavar="FILE",
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
    options = BudgetOptions(**vars(budget), **vars(solved))
    if published and options != BudgetOptions():
        raise InputError("--published has budgets of its own, and every pyramid for each: leave the other options out")
    if published:
        _show_published(sizes, times, as_json)
        return
    with nullcontext() if budget.measure is None else spinner("measuring layers"):
        found = make_plan(options, sizes)
    if as_json:
        print_json({"name": sizes.name, **found.as_dict(), **_measured(times, found)})
    else:
        _show(sizes, found, times, asked=solved.pyramid is not None)


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


def _show_published(sizes: Sizes, times: MeasuredTimes | None, as_json: bool) -> None:
    from pyramiddrop.planning import published_plans
    from pyramiddrop.report.tables.cost import published_table, times_line

    with user_input():
        found = published_plans(sizes.shape, sizes.prompt)
    if as_json:
        rows = [
            {"tokens": one.tokens, "pyramid": one.pyramid, "within_reach": one.within_reach, **one.plan.as_dict()}
            | _measured(times, one.plan)
            for one in found
        ]
        print_json({"name": sizes.name, "plans": rows})
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
