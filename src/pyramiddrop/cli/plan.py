"""The verb `plan`: solve the schedule for a budget, and print the Python line that makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyramiddrop.cli.options import AsJson, SizeOptions, with_groups
from pyramiddrop.cli.terminal import results, waiting

if TYPE_CHECKING:
    from pyramiddrop.inference.sizes import Sizes
    from pyramiddrop.planning import Plan

BUDGET, SOLVE = "The budget (exactly one)", "What is solved"


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
    profile: Annotated[
        Path | None,
        typer.Option(help="A redundancy profile (JSON): choose layers and shares.", rich_help_panel=SOLVE),
    ] = None,
    size_options: SizeOptions,
    as_json: AsJson = False,
) -> None:
    """Find the schedule for a budget: stages, layers, shares, what it costs, and the Python line to use it.

    Without --stages, --lam and --profile, λ and the number of equal stages are solved together: the fewest stages,
    from the paper's 4 on, that leave λ at 0.4 or above.
    """
    from pyramiddrop.inference.budgets import BudgetOptions, make_plan

    sizes = size_options.sizes()
    options = BudgetOptions(average_tokens, tflops, percent, kv_bytes, measure, convention, stages, lam, profile)
    if measure is None:
        found = make_plan(options, sizes)
    else:
        with waiting("measuring layers"):
            found = make_plan(options, sizes)
    if as_json:
        print(json.dumps({"name": sizes.name, **found.as_dict()}, indent=2))
    else:
        _show(sizes, found)


def _show(sizes: Sizes, found: Plan) -> None:
    from pyramiddrop.method_spec import VANILLA
    from pyramiddrop.report.tables.cost import account_table, stages_table

    console = results()
    console.print("from pyramiddrop import PyramidDrop\n")
    console.print(f"method = {found.line}\n", soft_wrap=True)
    console.print(stages_table(found))
    console.print(f"\n{sizes.about}\n", soft_wrap=True)
    console.print(account_table([(VANILLA, found.vanilla), ("PyramidDrop", found.cost)]))
    if sizes.remark:
        console.print(f"\n{sizes.remark}", soft_wrap=True)
    limit, spent, vanilla = map(found.budget.describe, (found.budget.limit, found.spent, found.vanilla_spent))
    console.print(f"\nThe budget is {limit}. This spends {spent}; vanilla, {vanilla}.", soft_wrap=True)
    if found.loss is not None:
        console.print(f"The profile predicts a loss of {found.loss:.4g}.", soft_wrap=True)
