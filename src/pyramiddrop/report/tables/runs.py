"""Tables and lines on the terminal: the cost of an answer, a comparison, and the demo's questions."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table
from rich.text import Text

from pyramiddrop.inference.answer import Comparison, Outcome
from pyramiddrop.inference.demo import Demo
from pyramiddrop.inference.prefill_stats import Usage
from pyramiddrop.report import units
from pyramiddrop.report.tables import judged, new_table

#: A quantity of vanilla and of the method.
Pair = Callable[[Callable[[Outcome], float]], tuple[float, float]]


def comparison_table(comparison: Comparison, method: str) -> Table:
    """One prompt without and with `method` (its name): answers, tokens, cost and time."""
    plain, pruned = comparison.vanilla, comparison.pruned
    table = new_table("", "vanilla", method, "ratio")
    same = "same" if plain.answer == pruned.answer else "differs"
    table.add_row("answer", Text(plain.answer), Text(pruned.answer), same)
    _add_costs(table, comparison, lambda of: (of(plain), of(pruned)))
    return table


def questions_table(demo: Demo) -> Table:
    """A row for each question: its picture, the true answer, and both answers."""
    table = new_table("question", "picture", "true answer", "vanilla", "PyramidDrop")
    for asked in demo.asked:
        question, compared = asked.question, asked.comparison
        vanilla = judged(compared.vanilla.answer, asked.vanilla_right)
        pruned = judged(compared.pruned.answer, asked.pruned_right)
        table.add_row(question.question, question.image.stem, question.answer, vanilla, pruned)
    return table


def costs_table(demo: Demo) -> Table:
    """The tokens, and the medians of cost and time over the demo's questions."""
    table = new_table("a prompt, median of all", "vanilla", "PyramidDrop", "ratio")
    _add_costs(table, demo.asked[0].comparison, demo.medians)
    batch = demo.batch
    times = map(units.seconds, (batch.vanilla.cpu, batch.pruned.cpu))
    table.add_row(f"CPU time of {batch.size} prompts at once", *times, units.share(batch.cpu_ratio))
    return table


def summary(demo: Demo) -> list[str]:
    """What the demo's numbers show and do not show, in paragraphs."""
    total, flops = len(demo.asked), demo.asked[0].comparison.flops_ratio
    plain, pruned = (sum(right) for right in zip(*demo.right, strict=True))
    runs = timed(demo.asked[0].comparison)
    alone, together = units.share(demo.prefill_cpu_ratio), units.share(demo.batch.cpu_ratio)
    return [
        f"Right answers: vanilla {plain} of {total}, PyramidDrop {pruned} of {total}. So few are no benchmark; "
        "`pyramiddrop eval --tasks reader` is one.",
        f"On one CPU thread the prefill of one prompt, vision tower included, takes {alone} of vanilla's CPU time, and "
        f"that of {demo.batch.size} prompts at once {together}. Both take turns, and the {runs} "
        "counts, for other programs only add to it.",
        f"The decoder's FLOPs fall to {units.share(flops)}; the vision tower, about a quarter of vanilla's time here, "
        "is not made cheaper.",
    ]


def failures(demo: Demo) -> list[str]:
    """Each question that only PyramidDrop answers wrongly, with the reason."""
    return [f"Where dropping fails: {one.question.question} {one.why_wrong}" for one in demo.asked if one.why_wrong]


#: Next steps after the demo.
OWN_MODEL = 'pyramiddrop generate --model ID_OR_FOLDER --image photo.jpg --prompt "What is this?" --compare'


def usage_line(used: Usage, plain: Usage) -> str:
    """The usage of one answer, on one line."""
    return (
        f"visual tokens {units.arrow(used.tokens_by_stage)} · "
        f"prefill {units.flops(used.flops)} ({units.share(used.flops / plain.flops)} of vanilla) · "
        f"KV cache {units.size(used.kv_bytes)} ({units.share(used.kv_bytes / plain.kv_bytes)})"
    )


def timed(comparison: Comparison) -> str:
    """`fastest of 5 runs`: the statistic of a comparison's times."""
    return f"{'fastest' if comparison.fastest else 'median'} of {comparison.runs} runs"


def _add_costs(table: Table, comparison: Comparison, pair: Pair) -> None:
    tokens = [units.arrow(one.usage.tokens_by_stage) for one in (comparison.vanilla, comparison.pruned)]
    table.add_row("visual tokens by stage", *tokens, "")
    rows: list[tuple[str, Callable[[float], str], Callable[[Outcome], float]]] = [
        ("prefill FLOPs, predicted", units.flops, lambda one: one.usage.flops),
        ("KV cache", units.size, lambda one: one.usage.kv_bytes),
        (f"prefill, {timed(comparison)}", units.seconds, lambda one: one.prefill.wall),
        ("the same, CPU time", units.seconds, lambda one: one.prefill.cpu),
    ]
    for name, written, value in rows:
        before, after = pair(value)
        table.add_row(name, written(before), written(after), units.share(after / before) if before else "")
