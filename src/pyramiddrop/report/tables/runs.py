"""Tables and lines on the terminal: what an answer cost, a comparison, and the demo's questions."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table
from rich.text import Text

from pyramiddrop.inference.answer import Comparison, Outcome
from pyramiddrop.inference.demo import Demo
from pyramiddrop.inference.prefill_stats import Usage
from pyramiddrop.report import units
from pyramiddrop.report.tables.style import new_table

#: Of a number that each way to run has: that of vanilla, and that of the method.
Pair = Callable[[Callable[[Outcome], float]], tuple[float, float]]


def comparison_table(comparison: Comparison, method: str) -> Table:
    """One prompt without and with `method` (its name): answers, tokens, cost and time."""
    plain, pruned = comparison.vanilla, comparison.pruned
    table = new_table("", "vanilla", method, "ratio")
    same = "same" if plain.answer == pruned.answer else "differs"
    table.add_row("answer", Text(plain.answer), Text(pruned.answer), same)
    _add_costs(table, plain.usage, pruned.usage, lambda of: (of(plain), of(pruned)), comparison.runs)
    return table


def questions_table(demo: Demo) -> Table:
    """One row a question: its picture, the true answer, and both answers."""
    table = new_table("question", "picture", "true answer", "vanilla", "PyramidDrop")
    for asked in demo.asked:
        table.add_row(
            asked.question.question,
            asked.question.image.stem,
            asked.question.answer,
            _judged(asked.comparison.vanilla.answer, asked.vanilla_right),
            _judged(asked.comparison.pruned.answer, asked.pruned_right),
        )
    return table


def costs_table(demo: Demo) -> Table:
    """The tokens, and the medians over the demo's questions of cost and time."""
    first = demo.asked[0].comparison
    table = new_table("a prompt, median of all", "vanilla", "PyramidDrop", "ratio")
    _add_costs(table, first.vanilla.usage, first.pruned.usage, demo.medians, first.runs)
    return table


def summary(demo: Demo) -> list[str]:
    """What the demo's numbers say, and what they do not say, a paragraph each."""
    big, total = demo.midsize, len(demo.asked)
    plain, pruned = (sum(right) for right in zip(*demo.right, strict=True))
    return [
        f"Right answers: vanilla {plain} of {total}, PyramidDrop {pruned} of {total}. So few are no benchmark; "
        "the bundled model's card has one.",
        f"This model is tiny, with {demo.asked[0].comparison.vanilla.usage.visual_tokens} visual tokens: its prefill "
        "time (vision tower included) is Python that starts small kernels, and ranking starts some more. What counts "
        "here are the FLOPs and the KV cache, not the milliseconds.",
        f"Where computing takes the time (a random decoder of {big.parameters / 1e6:.0f} M parameters with "
        f"{units.arrow(big.pruned.tokens_by_stage)} visual tokens, one CPU thread), the prefill falls from "
        f"{units.seconds(big.vanilla_time.wall)} to {units.seconds(big.pruned_time.wall)}: "
        f"{units.share(big.measured)} of vanilla, where the FLOPs predict {units.share(big.predicted)}.",
    ]


def usage_line(used: Usage, plain: Usage) -> str:
    """What one answer used, on one line."""
    return (
        f"visual tokens {units.arrow(used.tokens_by_stage)} · "
        f"prefill {units.flops(used.flops)} ({units.share(used.flops / plain.flops)} of vanilla) · "
        f"KV cache {units.size(used.kv_bytes)} ({units.share(used.kv_bytes / plain.kv_bytes)})"
    )


def _add_costs(table: Table, plain: Usage, pruned: Usage, pair: Pair, runs: int) -> None:
    table.add_row("visual tokens by stage", units.arrow(plain.tokens_by_stage), units.arrow(pruned.tokens_by_stage), "")
    rows: list[tuple[str, Callable[[float], str], Callable[[Outcome], float]]] = [
        ("prefill FLOPs, predicted", units.flops, lambda one: one.usage.flops),
        ("KV cache", units.size, lambda one: one.usage.kv_bytes),
        (f"prefill, median of {runs} runs", units.seconds, lambda one: one.prefill.wall),
        ("the same, CPU time", units.seconds, lambda one: one.prefill.cpu),
    ]
    for name, written, value in rows:
        before, after = pair(value)
        table.add_row(name, written(before), written(after), units.share(after / before) if before else "")


def _judged(answer: str, right: bool) -> Text:
    return Text(f"{answer} {'✓' if right else '✗'}", style="green" if right else "red")
