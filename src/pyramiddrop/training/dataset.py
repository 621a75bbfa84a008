"""Load a training set from a file, a folder or the hub, and check each sample before the first step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from pyramiddrop import __version__
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.training.collate import AnswerCollator
from pyramiddrop.training.samples import BrokenSampleError, json_records, read_sample

LENGTH = "length"
#: The column for records of a JSON file as text, because the types of their fields may differ.
RECORD = "record"
#: The number of samples for which a further checking process is worthwhile.
SAMPLES_A_PROCESS = 1000

TEXT = datasets.Value("string")
CHECKED = datasets.Features(
    {
        "messages": datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT})}),
        "images": datasets.List(TEXT),
        LENGTH: datasets.Value("int64"),
        "inside": datasets.Value("bool"),
        "error": TEXT,
    }
)


@dataclass
class Report:
    """The number of good samples, and the broken ones as `file[index]: why`."""

    good: int = 0
    broken: list[str] = field(default_factory=list)


def load_samples(
    source: str | Path,
    collator: AnswerCollator,
    images: Path | None = None,
    max_length: int | None = None,
    skip_broken: bool = False,
) -> tuple[datasets.Dataset, Report]:
    """Load a table with `messages`, `images` and `length` of all good samples, for `AnswerCollator` and any trainer.

    Several processes check large tables. The results are stored in the cache of `datasets` while the data and the
    processor are the same; broken samples are checked again.

    Args:
        source: a JSON or JSON-lines file of conversations, a folder saved by `datasets`, or the name of a data set on
            the hub, of which the split "train" is used.
        collator: the model's collator, for lengths.
        images: the folder of relative image files; None: the folder of the source file.
        max_length: samples with more tokens, including visual tokens, count as broken; none is truncated.
        skip_broken: leave out broken samples and report them; otherwise the first one is fatal.

    Raises:
        InputError: if the source cannot be read, a sample is broken and may not be skipped, or no sample is good.
    """
    name, records = _read(source)
    if not len(records):
        raise InputError(f"{name} holds no sample to train on")
    folder = images or (Path(source).parent if Path(source).is_file() else None)
    checked = _checked(_undecoded(records), _Check(collator, folder, max_length))
    errors = checked["error"][:]
    broken = [f"{name}[{index}]: {error}" for index, error in enumerate(errors) if error is not None]
    if broken and not skip_broken:
        more = f" ({len(broken) - 1} more are broken; --skip-broken leaves them out)" if len(broken) > 1 else ""
        raise InputError(broken[0] + more)
    if len(broken) == len(errors):
        raise InputError(f"{name} holds no sample to train on; {broken[0]}")
    good = [index for index, error in enumerate(errors) if error is None]
    return _table(name, records, checked, images).select(good), Report(len(good), broken)


def with_fillers(table: datasets.Dataset, ranks_batch: int) -> datasets.Dataset:
    """Append fillers to `table` so that its last batch of `ranks_batch` samples over all ranks is complete.

    accelerate would complete it with the epoch's first samples, whose loss would count twice. A filler is a question
    without image and answer, which does not contribute to any loss; its length is 0.
    """
    question = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    missing = [{"messages": question, "images": None, LENGTH: 0}] * (-len(table) % ranks_batch)
    if not missing:
        return table
    return datasets.concatenate_datasets([table, datasets.Dataset.from_list(missing, features=table.features)])


@dataclass(frozen=True)
class _Check:
    """Reads a record and checks it; a dataclass, so that the cache of `datasets` recognises it."""

    collator: AnswerCollator
    folder: Path | None
    max_length: int | None
    version: str = __version__

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The sample of a record in the columns CHECKED, without pictures that are in the data itself."""
        try:
            sample = read_sample(json.loads(row[RECORD]) if RECORD in row else row, self.folder)
            length = self.collator.length(sample)
            if self.max_length is not None and length > self.max_length:
                raise BrokenSampleError(f"{length} tokens are more than --max-length {self.max_length}")
        except BrokenSampleError as error:
            return {"messages": None, "images": None, LENGTH: None, "inside": False, "error": str(error)}
        files = [image for image in sample.images if isinstance(image, str)]
        inside = len(files) < len(sample.images)
        return {"messages": sample.messages, "images": files, LENGTH: length, "inside": inside, "error": None}


def _checked(records: datasets.Dataset, check: _Check) -> datasets.Dataset:
    """The results of `check` for each record, from the cache if possible; broken ones are checked again."""
    fingerprint = Hasher.hash([records._fingerprint, check])
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "pyramiddrop"
    cache.mkdir(parents=True, exist_ok=True)
    named = {"cache_file_name": str(cache / f"{fingerprint}.arrow"), "new_fingerprint": fingerprint}
    checked_before = any(cache.glob(f"{fingerprint}*"))
    found = _mapped(records, check, **named)
    broken = [index for index, error in enumerate(found["error"][:]) if error is not None]
    if checked_before and broken:
        again = _mapped(records.select(broken), check, load_from_cache_file=False, keep_in_memory=True)
        if None in again["error"][:]:
            return _mapped(records, check, load_from_cache_file=False, **named)
    return found


def _mapped(records: datasets.Dataset, check: _Check, **caching: Any) -> datasets.Dataset:
    processes = min(os.cpu_count() or 1, len(records) // SAMPLES_A_PROCESS)
    return records.map(
        check,
        remove_columns=records.column_names,
        features=CHECKED,
        num_proc=processes if processes > 1 else None,
        desc="checking samples",
        **caching,
    )


def _undecoded(records: datasets.Dataset) -> datasets.Dataset:
    """`records` with pictures as undecoded bytes, because the check only reads headers."""
    for name in _picture_columns(records):
        feature = records.features[name]
        if isinstance(feature, datasets.Image):
            records = records.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            records = records.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return records


def _picture_columns(records: datasets.Dataset) -> list[str]:
    return [name for name in ("images", "image") if name in records.column_names]


def _table(name: str, records: datasets.Dataset, checked: datasets.Dataset, folder: Path | None) -> datasets.Dataset:
    """Copy names of image files into the table; pictures in the data stay there and are decoded on access."""
    table = checked.select_columns(["messages", "images", LENGTH])
    if not any(checked["inside"][:]):
        return table
    own = _picture_columns(records)
    if len(own) > 1:
        raise InputError(f"{name} holds pictures in one of the columns {' and '.join(own)}; remove the other")
    if folder is not None and any(checked["images"][:]):
        raise InputError(f"{name} holds pictures and names of files; --images cannot be used with both")
    pictures = records.select_columns(own).rename_columns({own[0]: "images"})
    return datasets.concatenate_datasets([table.remove_columns("images"), pictures], axis=1)


def _read(source: str | Path) -> tuple[str, datasets.Dataset]:
    """The name of the source for messages, and its records."""
    path = Path(source)
    if path.is_file():
        with user_input(f"cannot read {path}", (OSError, ValueError)):
            texts = [json.dumps(record) for record in json_records(path)]
            return path.name, datasets.Dataset.from_dict({RECORD: texts}, datasets.Features({RECORD: TEXT}))
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
