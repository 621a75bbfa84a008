"""Milliseconds of a plan, interpolated in a record of `pyramiddrop bench` for the same model and prompt."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from pyramiddrop.cost import CostBreakdown, ModelShape, Prompt, estimate_cost
from pyramiddrop.planning.profile import read_json

#: Sizes of the decoder, then of the prompt, that must equal the record's.
SIZES = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim")
TOKENS = ("visual_tokens", "text_tokens")
#: FLOPs that differ by at most this share count as equal, because versions count ranking differently.
ALIKE = 0.005


@dataclass(frozen=True)
class MeasuredTimes:
    """Times of a decoder's prefill of a single prompt, for vanilla and methods, by FLOPs.

    Attributes:
        subject: the sizes of the model and the prompt in the record.
        about: a description of what was measured and where.
        vanilla: predicted FLOPs of vanilla's prefill.
        points: predicted FLOPs of the decoder's layers and the ranking, with measured milliseconds; ascending.
    """

    subject: dict[str, Any]
    about: str
    vanilla: float
    points: tuple[tuple[float, float], ...]

    @classmethod
    def read(cls, path: str | Path) -> MeasuredTimes:
        """Read the output of `pyramiddrop bench --json`.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is not such a record, or has no times of single prompts; the message says why.
        """
        return read_json(path, cls.from_dict, "record of `pyramiddrop bench --json`")

    @classmethod
    def from_dict(cls, record: Any) -> MeasuredTimes:
        """Build from a record.

        Raises:
            KeyError, TypeError, ValueError: for anything else.
        """
        if record["kind"] != "generation":
            raise ValueError(f"it measures {record['kind']}; run bench without --train and --overhead")
        single = [one for one in record["results"] if one["batch"] == 1]
        if not single:
            raise ValueError("it has no batch of 1, and a plan is of one prompt; run bench with --batch 1")
        found = [(float(one["predicted"]["flops"]), 1000 * float(one["decoder"]["median"])) for one in single]
        alike = groupby(sorted(found), key=lambda point: point[0])
        points = tuple((flops, mean(time for _, time in same)) for flops, same in alike)
        if len(points) < 2:
            raise ValueError("a line needs two measurements that differ in FLOPs; name a --method that drops tokens")
        vanilla = [float(one["predicted"]["flops"]) for one in single if one["variant"] == "vanilla"]
        if not vanilla:
            raise ValueError("it has no vanilla")
        subject, machine = record["subject"], record["machine"]
        about = (
            f"{subject['name']}, {subject['dtype']}, on {machine['device']} ({machine['architecture']}, "
            f"{machine['threads']} thread(s)), {record['setting']['clock']}"
        )
        return cls({name: subject[name] for name in (*SIZES, *TOKENS)}, about, vanilla[0], points)

    def check(self, model: ModelShape, prompt: Prompt) -> None:
        """Raise ValueError if the record is of another model or another prompt."""
        own = {name: getattr(model.decoder, name) for name in SIZES} | {name: getattr(prompt, name) for name in TOKENS}
        for name, value in own.items():
            if self.subject[name] != value:
                way_out = f"give --{name.replace('_', '-')} {self.subject[name]}, or " if name in TOKENS else ""
                raise ValueError(
                    f"the record's {name} is {self.subject[name]}, and the plan's is {value}: {way_out}run bench for "
                    "the model and prompt of the plan"
                )
        flops = estimate_cost(model, prompt).full.pruned
        if abs(flops - self.vanilla) > ALIKE * self.vanilla:
            raise ValueError(
                f"the record's untouched prefill has {self.vanilla:.4g} FLOPs, and the plan's has {flops:.4g}: "
                "run bench for the model of the plan"
            )

    def milliseconds(self, cost: CostBreakdown) -> float | None:
        """The time of a prefill with this cost, interpolated in FLOPs between the two nearest measurements.

        None outside of the measured range.
        """
        flops, least, most = cost.full.pruned, self.points[0][0], self.points[-1][0]
        if least * (1 - ALIKE) <= flops <= most * (1 + ALIKE):
            return interpolated(self.points, min(max(flops, least), most))
        return None

    @property
    def error(self) -> float | None:
        """The largest relative error of predicting each measurement from its two neighbours; None for fewer than
        three."""
        neighbours = zip(self.points, self.points[1:], self.points[2:], strict=False)
        errors = (abs(interpolated((one, two), flops) - time) / time for one, (flops, time), two in neighbours)
        return max(errors, default=None)


def interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    """The value at `at`, interpolated linearly between ascending `points`."""
    above = max(1, bisect_left(points, (at, float("-inf"))))
    (left, before), (right, value) = points[above - 1], points[above]
    return before + (value - before) * (at - left) / (right - left)
