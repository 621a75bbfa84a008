"""Load a training set from a file, a folder or the hub, checked sample by sample before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from pyramiddrop.inference.errors import InputError, user_input
from pyramiddrop.training.collate import AnswerCollator
from pyramiddrop.training.samples import BrokenSampleError, Message, Sample, json_records, read_sample

LENGTH = "length"


@dataclass
class Report:
    """What the check found: how many samples are good, and which are not, each as `file[index]: why`."""

    good: int = 0
    broken: list[str] = field(default_factory=list)


def load_samples(
    source: str | Path,
    collator: AnswerCollator,
    images: Path | None = None,
    max_length: int | None = None,
    skip_broken: bool = False,
) -> tuple[datasets.Dataset, Report]:
    """A table with `messages`, `images` and `length` of every good sample, for `AnswerCollator` and any trainer.

    Args:
        source: a JSON or JSON-lines file of conversations, a folder that `datasets` saved, or a data set's name on the
            hub, of which the split "train" is taken.
        collator: of the model, for the lengths.
        images: the folder that names of image files start from; a file's own folder if None.
        max_length: samples with more tokens, the visual ones included, are broken: none is cut.
        skip_broken: leave broken samples out and report them; else the first one is fatal.

    Raises:
        InputError: for a source that cannot be read, for the first broken sample where none may be skipped, and where
            none is good.
    """
    name, records = _read(source)
    folder = images or (Path(source).parent if Path(source).is_file() else None)
    report, good = Report(), {}
    for index, record in enumerate(records):
        try:
            sample = read_sample(record, folder)
            good[index] = sample, _checked_length(sample, collator, max_length)
        except BrokenSampleError as error:
            broken = f"{name}[{index}]: {error}"
            if not skip_broken:
                raise InputError(broken) from error
            report.broken.append(broken)
    report.good = len(good)
    if not good:
        raise InputError(f"{name} holds no sample to train on" + (f"; {report.broken[0]}" if report.broken else ""))
    return _table(records, good), report


def _checked_length(sample: Sample, collator: AnswerCollator, max_length: int | None) -> int:
    length = collator.length(sample)
    if max_length is not None and length > max_length:
        raise BrokenSampleError(f"{length} tokens are more than --max-length {max_length}")
    return length


def _table(records: Any, good: Mapping[int, tuple[Sample, int]]) -> datasets.Dataset:
    """Names of image files are copied into the table; pictures stay where they are, and are decoded when asked for."""
    if isinstance(records, datasets.Dataset) and not all(_are_files(sample.images) for sample, _ in good.values()):
        own = next(name for name in ("images", "image") if name in records.column_names)
        table = records.select_columns([own]).rename_columns({own: "images"} if own == "image" else {})
        nothing = (None, None)
        table = table.add_column("messages", [_messages(good.get(index)) for index in range(len(records))])
        table = table.add_column(LENGTH, [good.get(index, nothing)[1] for index in range(len(records))])
        return table.select(list(good))
    return datasets.Dataset.from_dict(
        {
            "messages": [sample.messages for sample, _ in good.values()],
            "images": [sample.images for sample, _ in good.values()],
            LENGTH: [length for _, length in good.values()],
        }
    )


def _messages(entry: tuple[Sample, int] | None) -> list[Message] | None:
    return None if entry is None else entry[0].messages


def _are_files(images: Sequence[Any]) -> bool:
    return all(isinstance(image, str) for image in images)


def _read(source: str | Path) -> tuple[str, Any]:
    """The source's name in messages, and its records."""
    path = Path(source)
    if path.is_file():
        with user_input(f"cannot read {path}", (OSError, ValueError)):
            return path.name, list(json_records(path))
    if path.is_dir():
        with user_input(f"cannot read {path} as a data set", (OSError, ValueError)):
            return path.name, _train_split(datasets.load_from_disk(str(path)), path.name)
    if path.is_absolute() or str(source).startswith((".", "~")) or path.suffix in (".json", ".jsonl"):
        raise InputError(f"no such file: {source}")
    with user_input(f"cannot load the data set {source}", (OSError, ValueError)):
        return str(source), _train_split(datasets.load_dataset(str(source)), str(source))


def _train_split(loaded: Any, name: str) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if "train" not in loaded:
        raise ValueError(f"{name} has no split 'train'; it has {', '.join(loaded)}")
    return loaded["train"]
