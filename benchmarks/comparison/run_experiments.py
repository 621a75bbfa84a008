"""Runs the experiments of benchmarks/comparison/experiments that have no result yet; docs/comparison.md shows them all.

    python benchmarks/comparison/run_experiments.py                 # all that have no result
    python benchmarks/comparison/run_experiments.py --only reader   # of one folder
    python benchmarks/comparison/run_experiments.py --model llava-hf/llava-1.5-7b-hf --tasks mme,pope

An experiment is a file: task, method, and where they are not the defaults model, limit and batch. All experiments of a
folder ask the same model the same questions. With --model and --tasks a folder is written first, with the methods of
experiments/reader. `python benchmarks/comparison_document.py` then puts the results into docs/comparison.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyramiddrop.evaluation.lmms import MODEL
from pyramiddrop.evaluation.lmms.arguments import write_arguments
from pyramiddrop.evaluation.lmms.run import benchmarks_record, check_installed, read_measured
from pyramiddrop.evaluation.record import evaluation_record
from pyramiddrop.evaluation.run import EvalOptions, Evaluator
from pyramiddrop.evaluation.store import write_json
from pyramiddrop.evaluation.tasks import BUNDLED_TASKS, READER, choose_task
from pyramiddrop.inference import InputError
from pyramiddrop.inference.resolve import parse_method
from pyramiddrop.methods import Method

HERE = Path(__file__).parent
#: Replies, and what lmms-eval writes: a stopped run goes on from them.
KEPT = HERE.parents[1] / "runs" / "comparison"
ROUNDS, LONGEST = 3, 8


@dataclass(frozen=True)
class Experiment:
    """What a file of experiments/ says, and where it is.

    Attributes:
        board: the folder's name; its experiments differ in the method alone.
        name: the file's name, without `.json`.
        task: digits, reader, or tasks of lmms-eval with commas between them.
        method: in words, as `--method` takes it.
        model: None for the bundled one.
        limit: questions (of each task); None for all.
        batch: questions of one forward, and of the prefill that is timed.
    """

    board: str
    name: str
    task: str
    method: str
    model: str | None = None
    limit: int | None = None
    batch: int = 1

    @property
    def asked(self) -> dict[str, Any]:
        """What the result depends on."""
        return {name: value for name, value in asdict(self).items() if name not in ("board", "name")}

    @property
    def bundled(self) -> bool:
        """Whether the task is one of this library's own."""
        return self.task in BUNDLED_TASKS


TYPES = {"task": str, "method": str, "model": str, "limit": int, "batch": int}


def main(words: Sequence[str] | None = None, root: Path = HERE, kept: Path = KEPT) -> int:
    """Run what `words` ask for; the exit code is that of a command.

    Args:
        root: the folder of experiments/ and results/.
        kept: where replies are kept until there is a result.
    """
    given = _parser().parse_args(words)
    try:
        if (given.model is None) != (given.tasks is None):
            raise InputError("--model and --tasks belong together: they name experiments to add")
        if given.model:
            add_experiments(root, given.model, given.tasks, given.limit, given.batch)
        chosen = [one for one in read_experiments(root) if given.only in (None, one.board)]
        if not chosen:
            raise InputError(f"no experiments in {root / 'experiments' / (given.only or '')}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    waiting = [one for one in chosen if read_result(root, one) is None]
    print(f"{len(chosen) - len(waiting)} of {len(chosen)} experiments have a result", flush=True)
    passed = [_passed(one, root, kept, given) for one in waiting]
    return 0 if all(passed) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="FOLDER", help="of experiments/ (default: all)")
    parser.add_argument("--model", help="add experiments: folder or hub name of a checkpoint")
    parser.add_argument("--tasks", help="of --model: digits, reader, or tasks of lmms-eval with commas between them")
    parser.add_argument("--limit", type=int, help="of --model: questions of each task (default: all)")
    parser.add_argument("--batch", type=int, default=1, help="of --model: questions of one forward (default: 1)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--include", type=Path, help="a folder with tasks of your own for lmms-eval")
    return parser


# --- Experiments and results ----------------------------------------------------------------------------------------


def read_experiments(root: Path = HERE) -> list[Experiment]:
    """All of them, checked, by folder and name.

    Raises:
        InputError: for a file that is none, by its name.
    """
    found = [_read(path) for path in sorted((root / "experiments").glob("*/*.json"))]
    first: dict[str, Experiment] = {}
    for one in found:
        other = first.setdefault(one.board, one)
        for name in ("task", "model", "limit", "batch"):
            if getattr(one, name) != getattr(other, name):
                raise InputError(
                    f"{one.board}/{one.name}.json: {name} is {getattr(one, name)!r}, and {getattr(other, name)!r} in "
                    f"{other.name}.json: experiments of a folder differ in the method alone"
                )
        same = next((it.name for it in found if it.board == one.board and it.method == one.method), one.name)
        if same != one.name:
            raise InputError(f"{one.board}/{one.name}.json: {same}.json has the same method {one.method!r}")
    return found


def _read(path: Path) -> Experiment:
    try:
        given = json.loads(path.read_text("utf-8"))
        _check(given)
        experiment = Experiment(path.parent.name, path.stem, **given)
        method = parse_method(experiment.method)
        if not experiment.bundled:
            write_arguments(str(experiment.model), method, {})
    except (OSError, ValueError) as error:
        raise InputError(f"{path.parent.name}/{path.name}: {error}") from error
    return experiment


def _check(given: Any) -> None:
    """Raise ValueError for what is no experiment."""
    if not isinstance(given, dict):
        raise ValueError("must be a JSON object")
    for name in ("task", "method"):
        if name not in given:
            raise ValueError(f"{name!r} is missing")
    for name, value in given.items():
        if name not in TYPES:
            raise ValueError(f"unknown field {name!r}; the fields are {', '.join(TYPES)}")
        if type(value) is not TYPES[name] or value in (0, "") or (TYPES[name] is int and value < 0):
            what = "a whole number from 1" if TYPES[name] is int else "a text"
            raise ValueError(f"{name} must be {what}; got {value!r}")
    if given["task"] not in BUNDLED_TASKS and "model" not in given:
        own = " and ".join(BUNDLED_TASKS)
        raise ValueError(f"task {given['task']!r} needs a model: only {own} have a bundled one")


def add_experiments(root: Path, model: str, tasks: str, limit: int | None = None, batch: int = 1) -> None:
    """Write a folder of experiments with the methods of experiments/reader; files that are there already stay."""
    board = re.sub(r"[^\w.]+", "-", f"{Path(model).name}-{tasks}").strip("-")
    values = {"task": tasks, "model": model, "batch": batch, **({"limit": limit} if limit else {})}
    for one in read_experiments(root):
        path = root / "experiments" / board / f"{one.name}.json"
        if one.board == READER and not path.exists():
            _check({**values, "method": one.method})
            write_json(path, {**values, "method": one.method})


def result_path(root: Path, experiment: Experiment) -> Path:
    """Where the result of an experiment is, or will be."""
    return root / "results" / experiment.board / f"{experiment.name}.json"


def read_result(root: Path, experiment: Experiment) -> dict[str, Any] | None:
    """The record of `eval --json` that was measured; None where there is none, or of what the file said before."""
    path = result_path(root, experiment)
    if not path.is_file():
        return None
    found = json.loads(path.read_text("utf-8"))
    return found["record"] if found["experiment"] == experiment.asked else None


# --- Measuring ------------------------------------------------------------------------------------------------------


def _passed(experiment: Experiment, root: Path, kept: Path, given: argparse.Namespace) -> bool:
    """Run one experiment and write its result; an error is printed, and the next experiment runs."""
    start, name = time.perf_counter(), f"{experiment.board}/{experiment.name}"
    try:
        if experiment.bundled:
            record = measure_bundled(experiment, kept / experiment.board, given.device)
        else:
            folder = kept / experiment.board / experiment.name
            record = measure_lmms(experiment, folder, given.device, given.include)
        write_json(result_path(root, experiment), {"experiment": experiment.asked, "record": record})
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        return False
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return True


def measure_bundled(experiment: Experiment, folder: Path, device: str | None = None) -> Mapping[str, Any]:
    """The record of `pyramiddrop eval`: vanilla, whose replies the experiments of a folder share, and the method."""
    task = choose_task(tasks=experiment.task, limit=experiment.limit)
    options = EvalOptions(
        methods=(experiment.method,),
        model=experiment.model,
        batch=experiment.batch,
        max_new_tokens=LONGEST,
        device=device,
        rounds=ROUNDS,
        output=folder,
    )
    return evaluation_record(Evaluator(task, options).run())


def measure_lmms(
    experiment: Experiment, folder: Path, device: str | None = None, include: Path | None = None
) -> Mapping[str, Any]:
    """The record of what lmms-eval measured in a process of its own, under the method alone.

    Raises:
        InputError: where lmms-eval is not installed, or fails; what failed it has printed.
    """
    check_installed()
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    done = subprocess.run(lmms_command(experiment, folder, device, include), check=False)
    if done.returncode or not any(folder.rglob("*_results.json")):  # it ends with 0 after most errors, too
        raise InputError(f"lmms-eval wrote no results and ended with exit code {done.returncode}")
    return benchmarks_record(read_measured(folder), experiment.model)


def lmms_command(
    experiment: Experiment, folder: Path, device: str | None = None, include: Path | None = None
) -> list[str]:
    """The command that runs an experiment's tasks in lmms-eval."""
    method: Method | None = parse_method(experiment.method)
    arguments = write_arguments(str(experiment.model), method, {})
    options = {"--limit": experiment.limit, "--device": device, "--include_path": include}
    command = [sys.executable, "-m", "lmms_eval", "--model", MODEL, "--model_args", arguments]
    command += ["--tasks", experiment.task, "--batch_size", str(experiment.batch), "--output_path", str(folder)]
    return command + [word for name, value in options.items() if value is not None for word in (name, str(value))]


if __name__ == "__main__":
    sys.exit(main())
