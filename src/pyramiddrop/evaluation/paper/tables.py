"""Published scores as data, with measured ones beside them: the paper's Tables 1 to 5, and scores at fixed budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from pyramiddrop.evaluation.lmms.run import Measured, TaskScore
from pyramiddrop.evaluation.paper import read_csv

#: MME's perception score is a sum, which averages take in percent of this value.
_MME, _MME_MOST = "mme", 2000
TITLES = {
    1: "Trained and asked with and without PyramidDrop",
    2: "Trained and asked with and without PyramidDrop, fine-grained benchmarks",
    3: "FastV on models trained with and without PyramidDrop",
    4: "Ablation of λ",
    5: "Training-free inference",
}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper: its name in the tables' columns and in the text, and how lmms-eval 0.7 measures it."""

    column: str
    name: str
    task: str  # empty if there is none
    metric: str  # lmms-eval's name of the printed metric
    scale: float  # converts lmms-eval's unit to the paper's
    note: str


@dataclass(frozen=True)
class PaperRow:
    """A row: its `settings` (the columns that are not scores), and its scores by column, as printed."""

    settings: Mapping[str, str]
    scores: Mapping[str, str]
    average: str

    @property
    def model(self) -> str:
        """The model and, if the table has them, its crops."""
        patches = self.settings.get("patches")
        return self.settings["model"] + (f", patches: {patches}" if patches else "")

    @property
    def variant(self) -> str:
        """The methods in training and inference."""
        told = self.settings
        if told.get("lambda", "vanilla") != "vanilla":
            return f"λ = {told['lambda']}"
        if "train" in told:
            return f"trained {told['train']}, asked {told['infer']}"
        return next(told[name] for name in ("lambda", "infer", "train_and_infer") if name in told)

    @property
    def tflops(self) -> str:
        """TFLOPs of inference; empty if the table does not have them."""
        return self.settings.get("infer_tflops", "")


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    number: int
    benchmarks: tuple[Benchmark, ...]
    rows: tuple[PaperRow, ...]

    @property
    def title(self) -> str:
        """Its number and subject."""
        return f"Table {self.number}: {TITLES[self.number]}"


@cache
def paper_benchmarks() -> dict[str, Benchmark]:
    """The paper's benchmarks by column: its 14, and ScienceQA of Tables 3 and 5."""
    rows = read_csv("benchmarks")
    return {row["column"]: Benchmark(**{**row, "scale": float(row["scale"] or 1)}) for row in rows}  # type: ignore[arg-type]


@cache
def paper_tables() -> tuple[PaperTable, ...]:
    """The paper's Tables 1 to 5."""
    return tuple(_table(number) for number in TITLES)


def average(scores: Mapping[str, float]) -> float:
    """The mean of scores by column, with MME in percent of 2000, as in the paper."""
    points = [100 * score / _MME_MOST if column == _MME else score for column, score in scores.items()]
    return sum(points) / len(points)


def _table(number: int) -> PaperTable:
    known, rows = paper_benchmarks(), read_csv(f"table{number}")
    columns = [column for column in rows[0] if column in known]
    found = []
    for row in rows:
        settings = {name: value for name, value in row.items() if name not in columns and name != "avg"}
        found.append(PaperRow(settings, {column: row[column] for column in columns}, row["avg"]))
    return PaperTable(number, tuple(known[column] for column in columns), tuple(found))


def _numbers(scores: Mapping[str, str]) -> dict[str, float]:
    return {column: float(score) for column, score in scores.items()}


def suite_record(measured: Sequence[Measured]) -> dict[str, Any]:
    """The benchmarks with their tasks, the paper's tables, and each measured method in the paper's units."""
    tables = []
    for table in paper_tables():  # with numbers as numbers
        rows = [{**one.settings, "scores": _numbers(one.scores), "average": float(one.average)} for one in table.rows]
        tables.append({"table": table.number, "title": TITLES[table.number], "rows": rows})
    return {
        "suite": "paper",
        "benchmarks": [asdict(benchmark) for benchmark in paper_benchmarks().values()],
        "tables": tables,
        "measured": [_beside(one) for one in measured],
    }


def _scores_by_column(one: Measured) -> dict[str, TaskScore]:
    """The measured scores on the paper's benchmarks, in its units."""
    found = {}
    for column, benchmark in paper_benchmarks().items():
        score, scale = one.scores.get(benchmark.task, {}).get(benchmark.metric), benchmark.scale
        if score is not None:
            found[column] = TaskScore(score.value * scale, None if score.error is None else score.error * scale)
    return found


def _beside(one: Measured) -> dict[str, Any]:
    """The scores by the paper's columns, and the average of each completely measured table."""
    found = _scores_by_column(one)
    values = {column: score.value for column, score in found.items()}
    averages = {
        str(table.number): average({column: values[column] for column in columns})
        for table in paper_tables()
        if set(columns := [benchmark.column for benchmark in table.benchmarks]) <= set(values)
    }
    scores = {column: asdict(score) for column, score in found.items()}
    return {"name": one.name, "scores": scores, "averages": averages, "costs": dict(one.costs)}


#: Benchmarks with scores, by the columns of `benchmarks.csv`; VQAv2 is not among the paper's.
COLUMNS = ("gqa", "mmbench", "mme", "pope", "sqa_image", "vqav2", "textvqa")


@dataclass(frozen=True)
class PublishedRow:
    """Published scores of a method at a budget."""

    model: str
    budget: float  # such as 64 "average tokens", or 25 "% of the tokens"; papers average over different layers
    unit: str
    method: str
    trained: str  # "no", "yes", or which part of the model was trained with the method
    scores: Mapping[str, str]  # by benchmark, as printed
    mean: str  # over `benchmarks` benchmarks; empty if not printed, like that of the `full` model
    full: str
    percent: str  # of the full model's quality, as printed, or else `mean` in percent of `full`
    benchmarks: str
    source: str
    version: str
    schedule: str  # the drop layers; "not printed", or empty for methods without any
    second_hand: bool  # taken from notes about the paper, not from the paper itself
    note: str


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """All published rows, by model, unit and budget, with PyramidDrop first."""
    found = []
    for row in read_csv("budgets"):
        rest: dict[str, Any] = {name: value for name, value in row.items() if name not in COLUMNS}
        rest |= {"budget": float(row["budget"]), "second_hand": row["second_hand"] == "yes"}
        found.append(PublishedRow(**rest, scores={column: row[column] for column in COLUMNS if row[column]}))
    return tuple(found)


def budgets_record(measured: Sequence[Measured]) -> dict[str, Any]:
    """The published rows, and each measured method in their units."""
    published, own = [], []
    for row in published_rows():  # numbers as numbers, and None for missing ones
        numbers = {name: float(text) if (text := getattr(row, name)) else None for name in ("mean", "full", "percent")}
        published.append({**asdict(row), **numbers, "scores": _numbers(row.scores)})
    for one in measured:
        found = _scores_by_column(one)
        scores = {column: found[column].value for column in COLUMNS if column in found}
        own.append({"name": one.name, "scores": scores, "costs": dict(one.costs)})
    return {"suite": "budgets", "published": published, "measured": own}


def benchmark_name(column: str) -> str:
    """The benchmark's name as papers write it."""
    known = paper_benchmarks()
    return known[column].name if column in known else "VQAv2"
