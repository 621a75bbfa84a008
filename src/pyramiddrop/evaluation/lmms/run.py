"""Run tasks of lmms-eval under one or several methods, like its own command, and read its results from their files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pyramiddrop import Method
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.budgets import choose_methods
from pyramiddrop.evaluation.lmms import MODEL
from pyramiddrop.evaluation.lmms.arguments import write_arguments
from pyramiddrop.evaluation.lmms.meter import COSTS
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.method_spec import VANILLA, method_label

RESULTS = "results.json"
_STDERR = "_stderr"


def run_tasks(
    model: str,
    method: Method | None,
    tasks: Sequence[str],
    limit: int | None = None,
    batch: int = 1,
    output: Path | None = None,
    cache: Path | None = None,
    device: str | None = None,
    include: Path | None = None,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Run tasks of lmms-eval.

    Args:
        model: a folder in Hugging Face's format, or a name on the hub.
        method: the method; None for vanilla.
        tasks: names or patterns of lmms-eval's tasks and groups.
        limit: number of questions of each task; None: all.
        output: a folder for lmms-eval's results, and for the answers to all questions.
        cache: a folder in which answers are stored and looked up, separately for each method.
        device: as in `pyramiddrop generate`.
        include: a folder with the user's own tasks.
        arguments: `backend`, and further arguments of the backend.

    Returns:
        lmms-eval's results. "results" has the scores of each task; "throughput" has averages over all requests
        (`avg_flops_ratio`, `avg_kv_ratio`, `avg_retained_visual_tokens`, ...) and over those of each task
        (`avg_flops_ratio/mme`). Empty in all processes except the first one.

    Raises:
        InputError: if lmms-eval is not installed, a task is unknown, or an argument cannot be used.
    """
    check_installed()
    options: dict[str, Any] = {
        "--limit": limit,
        "--output_path": output,
        "--use_cache": cache,
        "--device": device,
        "--include_path": include,
    }
    words = ["--model", MODEL, "--model_args", write_arguments(model, method, arguments), "--tasks", ",".join(tasks)]
    words += ["--batch_size", str(batch), *(["--log_samples"] if output else [])]
    words += [word for option, value in options.items() if value is not None for word in (option, str(value))]
    before, sys.argv = sys.argv, ["lmms-eval", *words]  # its command has no function for all of it
    try:
        with redirect_stdout(sys.stderr):
            return _evaluate()
    finally:
        sys.argv = before


def check_installed() -> None:
    """Raise InputError if lmms-eval is not installed."""
    if find_spec("lmms_eval") is None:
        raise InputError("lmms-eval is not installed: pip install 'pyramiddrop[eval]'")


def _evaluate() -> dict[str, Any]:
    from lmms_eval.__main__ import cli_evaluate_single, parse_eval_args

    _, arguments = parse_eval_args()
    try:
        results, _ = cli_evaluate_single(arguments)
    except ValueError as error:
        if str(error).startswith("Tasks not found"):
            raise InputError(f"{str(error).split('. Try')[0]}; `lmms-eval tasks` lists them") from error
        raise
    except AssertionError as error:
        if "used for generation only" in str(error):
            raise InputError("a task compares likelihoods, and lmms-eval asks those of no chat model") from error
        raise
    return dict(results or {})


@dataclass(frozen=True)
class TaskScore:
    """A score in lmms-eval's unit, with its standard error if lmms-eval gives one."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Measured:
    """The results of lmms-eval under one method: its label, scores by task and metric, and averages over requests."""

    name: str
    scores: Mapping[str, Mapping[str, TaskScore]]
    costs: Mapping[str, float] = field(default_factory=dict)  # `flops_ratio`, `retained_visual_tokens`, ...


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
        model: None: the bundled model. All other arguments are those of `run_tasks`, with its errors.
        output: the folder of lmms-eval's files. Each run answers again, because lmms-eval stores answers only at the
            end, and without their cost.
        progress: called with the label of the running method.
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
    """Read results from a file of lmms-eval's or ours, or from all files of a folder; InputError if there are none."""
    files = [path]
    if path.is_dir():
        own = path / RESULTS
        files = [own] if own.is_file() else sorted(path.rglob(f"*_{RESULTS}"))
    elif not path.is_file():
        raise InputError(f"no such file: {path}")
    if not files:
        raise InputError(f"no results of lmms-eval in {path}")
    return [one for file in files for one in _read(file)]


def _read(file: Path) -> list[Measured]:
    with user_input(f"cannot read {file}", (OSError, ValueError)):
        found = json.loads(file.read_text("utf-8"))
    try:
        if "methods" not in found:
            told = found["config"]["model_args"].split(",")
            words = [word for word in told if not word.startswith(("pretrained=", "backend="))]
            return [_measured(",".join(words) or str(found["config"]["model"]), found)]
        read = []
        for entry in found["methods"]:
            scores = {
                task: {name: TaskScore(**one) for name, one in of.items()} for task, of in entry["scores"].items()
            }
            read.append(Measured(entry["name"], scores, entry["costs"]))
        return read
    except (AttributeError, KeyError, TypeError):
        raise InputError(f"{file} holds no results of lmms-eval") from None


def _measured(name: str, results: Mapping[str, Any]) -> Measured:
    scores = {task: _scores(metrics) for task, metrics in results["results"].items()}
    averages = results.get("throughput") or {}
    costs = {name: averages[f"avg_{name}"] for name in COSTS if f"avg_{name}" in averages}
    return Measured(name, scores, costs)


def _scores(metrics: Mapping[str, Any]) -> dict[str, TaskScore]:
    """Parse `{"anls,none": 0.7, "anls_stderr,none": 0.01}` to scores by metric, without values that are not numbers."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    found = {}
    for name, value in numbers.items():
        metric, comma, kind = name.partition(",")
        if comma and _STDERR not in metric:
            found[metric] = TaskScore(value, numbers.get(f"{metric}{_STDERR},{kind}"))
    return found
