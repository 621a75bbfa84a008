"""Run lmms-eval under a method from Python, like its own command; the results are a dictionary."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pyramiddrop import Method
from pyramiddrop.evaluation.lmms import MODEL
from pyramiddrop.evaluation.lmms.arguments import write_arguments
from pyramiddrop.inference import InputError


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
    with _command_line(words):
        return _evaluate()


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


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """Run lmms-eval's command through `sys.argv` and capture its output, because it has no function for all of it."""
    before, sys.argv = sys.argv, ["lmms-eval", *words]
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.argv = before
