"""The digits benchmark as a task of lmms-eval's: a YAML file, two functions and a local data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from pyramiddrop.evaluation.samples import Sample, digits_samples

TASK, LONGEST = "pyramiddrop_digits", 5
YAML = """
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.pictures
doc_to_text: question
doc_to_target: answer
process_results: !function functions.score
generation_kwargs:
  max_new_tokens: {longest}
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
def pictures(doc):
    return [doc["image"].convert("RGB")]


def score(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


def samples() -> list[Sample]:
    """The questions of the task: 48 about 3 pictures."""
    return digits_samples("test", 3)


def write_task(folder: Path) -> Path:
    """Write the task into `folder`, and return it."""
    data = folder / "digits.parquet"
    rows = [{"image": one.images[0], "question": one.question, "answer": one.answers[0]} for one in samples()]
    features = Features(image=Image(), question=Value("string"), answer=Value("string"))
    Dataset.from_list(rows, features=features).to_parquet(data)
    (folder / f"{TASK}.yaml").write_text(YAML.format(task=TASK, data=data, longest=LONGEST))
    (folder / "functions.py").write_text(FUNCTIONS)
    return folder


def expected(answers: Sequence[str]) -> float:
    """The score of these answers."""
    return sum(given in one.answers for given, one in zip(answers, samples(), strict=True)) / len(samples())
