"""The verb `cost`: the cost of methods by every measure, side by side, and the paper's figures beside ours."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from pyramiddrop.cli.options import OUTPUT, AsJson, MethodOptions, Methods, SizeOptions, with_groups
from pyramiddrop.cli.terminal import print_json, say, stdout


@with_groups
def cost(
    *,
    size_options: SizeOptions,
    method: Methods = None,
    method_options: MethodOptions,
    paper: Annotated[bool, OUTPUT("--paper", help="Every FLOPs figure of the paper beside ours.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count what dropping saves: FLOPs, KV cache and tokens, without a model or a download.

    Three ways to count FLOPs: `full` is all that a prefill multiplies and adds, 2 for each; `paper` and `fastv` are
    what those papers print: visual tokens alone, 1 for each. Without --method: pyramiddrop and fastv as published.
    """
    if paper:
        _show_paper(as_json)
        return
    from pyramiddrop.inference.sizes import method_costs, published_costs
    from pyramiddrop.report.tables.cost import cost_table

    sizes, shared = size_options.sizes(), method_options.given
    if method:
        found, left_out = method_costs(method, shared, sizes), list[str]()
    else:  # those that have the given options
        published = ["fastv"] if "layer" in shared else ["pyramiddrop"] if shared else ["pyramiddrop", "fastv"]
        found, left_out = published_costs(published, shared, sizes)
    if as_json:
        about = {"name": sizes.name, "shape": asdict(sizes.shape), "prompt": asdict(sizes.prompt)}
        print_json(about | {"methods": [{"method": one.label, **one.cost.as_dict()} for one in found]})
    else:
        stdout().print(f"{sizes.about}\n", soft_wrap=True)
        stdout().print(cost_table([(one.label, one.cost) for one in found]))
        if sizes.remark:
            stdout().print(f"\n{sizes.remark}", soft_wrap=True)
    for reason in left_out:
        say(reason)


def _show_paper(as_json: bool) -> None:
    from pyramiddrop.evaluation.paper import paper_figures
    from pyramiddrop.report.tables.cost import paper_summary, paper_table

    figures = paper_figures()
    if as_json:
        print_json({"figures": [figure.as_dict() for figure in figures]})
        return
    stdout().print(paper_table(figures))
    stdout().print(f"\n{paper_summary(figures)}", soft_wrap=True)
