"""Owns what the studies of methods share: an evaluation whose ways have each a place in a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyramiddrop.evaluation.record import evaluation_record
from pyramiddrop.evaluation.run import Evaluator, Progress


@dataclass(frozen=True)
class Labelled:
    """An evaluation that is ready to run.

    Attributes:
        study: its name.
        labels: of every way after vanilla, what the record says of it beside.
    """

    study: str
    evaluator: Evaluator
    labels: Sequence[dict[str, Any]]

    def record(self, progress: Progress = lambda step, count: None) -> dict[str, Any]:
        """Run it. The record is that of the evaluation, with the labels, and what it was made with."""
        found = evaluation_record(self.evaluator.run(progress))
        vanilla, *ways = found["methods"]
        labelled = [{**label, **way} for label, way in zip(self.labels, ways, strict=True)]
        options = self.evaluator.options
        setting = {
            **found["task"],
            **{name: found[name] for name in ("model", "dtype", "batch")},
            "methods": options.methods,
            "percent": options.percents,
        }
        return {"study": self.study, **found, "methods": [vanilla, *labelled], "setting": setting}
