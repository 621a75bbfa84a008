"""Run tasks of lmms-eval under several methods, and read its results back from their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.budgets import choose_methods
from pyramiddrop.evaluation.lmms.meter import COSTS
from pyramiddrop.evaluation.lmms.run import check_installed, run_tasks
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.method_spec import VANILLA, method_label

RESULTS = "results.json"
_STDERR = "_stderr"


@dataclass(frozen=True)
class TaskScore:
    """A score in lmms-eval's unit, with its standard error if lmms-eval gives one."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Measured:
    """The results of lmms-eval under one method.

    Attributes:
        name: the label of the method.
        scores: the scores by task and metric.
        costs: averages over all requests (`flops_ratio`, `retained_visual_tokens`, ...).
    """

    name: str
    scores: Mapping[str, Mapping[str, TaskScore]]
    costs: Mapping[str, float] = field(default_factory=dict)


def run_benchmarks(
    tasks: Sequence[str],
    methods: Sequence[str] = (),
    model: str | None = None,
    limit: int | None = None,
    batch: int = 1,
    device: str | None = None,
    output: Path | None = None,
    include: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> list[Measured]:
    """Run tasks of lmms-eval under vanilla and `methods`; empty in all processes of a parallel run but the first.

    Args:
        methods: method specifications, as for `pyramiddrop.evaluation.budgets.choose_methods`.
        model: a folder or a name on the hub; None: the bundled model.
        output: the folder of lmms-eval's files. Each run answers again, because lmms-eval stores answers only at the
            end, and without their cost.
        include: a folder with the user's own tasks.
        progress: called with the label of the running method.

    Raises:
        InputError: if lmms-eval is not installed, or an argument cannot be used.
    """
    check_installed()
    source = model or str(digits_checkpoint())
    found = []
    for method in (None, *choose_methods(methods, source)):
        name = VANILLA if method is None else method_label(method)
        progress(name)
        results = run_tasks(source, method, tasks, limit, batch, output, None, device, include)
        if results:
            found.append(_measured(name, results))
    return found


def benchmarks_record(measured: Sequence[Measured], model: str | None) -> dict[str, Any]:
    """The results as plain values, which `read_measured` reads."""
    return {"suite": "lmms-eval", "model": model or "bundled", "methods": [asdict(one) for one in measured]}


def read_measured(path: Path) -> list[Measured]:
    """Read results from a file of lmms-eval's or ours, or from all files of a folder.

    Raises:
        InputError: if there are none.
    """
    if path.is_dir():
        own = path / RESULTS
        files = [own] if own.is_file() else sorted(path.rglob(f"*_{RESULTS}"))
        if not files:
            raise InputError(f"no results of lmms-eval in {path}")
        return [one for file in files for one in _read(file)]
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    return _read(path)


def _read(file: Path) -> list[Measured]:
    with user_input(f"cannot read {file}", (OSError, ValueError)):
        found = json.loads(file.read_text("utf-8"))
    try:
        if "methods" in found:
            return [_plain_measured(entry) for entry in found["methods"]]
        return [_measured(_arguments(found), found)]
    except (AttributeError, KeyError, TypeError):
        raise InputError(f"{file} holds no results of lmms-eval") from None


def _plain_measured(entry: Mapping[str, Any]) -> Measured:
    scores = {
        task: {metric: TaskScore(**score) for metric, score in metrics.items()}
        for task, metrics in entry["scores"].items()
    }
    return Measured(entry["name"], scores, entry["costs"])


def _measured(name: str, results: Mapping[str, Any]) -> Measured:
    scores = {task: _scores(metrics) for task, metrics in results["results"].items()}
    averages = results.get("throughput") or {}
    costs = {name: averages[f"avg_{name}"] for name in COSTS if f"avg_{name}" in averages}
    return Measured(name, scores, costs)


def _scores(metrics: Mapping[str, Any]) -> dict[str, TaskScore]:
    """Parse `{"anls,none": 0.7, "anls_stderr,none": 0.01}` to scores by metric, without values that are not numbers."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    found = {}
    for name, value in numbers.items():
        metric, comma, kind = name.partition(",")
        if comma and _STDERR not in metric:
            error = numbers.get(f"{metric}{_STDERR},{kind}")
            found[metric] = TaskScore(float(value), None if error is None else float(error))
    return found


def _arguments(found: Mapping[str, Any]) -> str:
    """The method's arguments in lmms-eval's configuration."""
    told = [
        word for word in found["config"]["model_args"].split(",") if not word.startswith(("pretrained=", "backend="))
    ]
    return ",".join(told) or str(found["config"]["model"])
