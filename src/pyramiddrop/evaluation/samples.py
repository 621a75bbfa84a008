"""Questions about pictures with their right answers, from a bundled benchmark or from a user's file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from PIL import Image

from pyramiddrop.evaluation.digits import DigitsBenchmark
from pyramiddrop.evaluation.reader import ReaderBenchmark
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.prompt import check_picture, open_picture
from pyramiddrop.training.samples import BrokenSampleError, json_records, listed, message_text, read_sample


@dataclass(frozen=True)
class Sample:
    """One question about one or several pictures."""

    images: Sequence[Image.Image]  # RGB; those of a user's file are opened on access
    question: str
    answers: tuple[str, ...] = ()  # the right ones, each of which counts; empty if none is known
    kind: str = "all"  # for scores by kind
    cluster: str = ""  # equal for samples that are not independent, such as those of one picture
    subkind: str = ""  # finer, for further scores; empty if there is none
    reads_text: bool = False  # True if the answer is read in the picture, as letters or figures


#: Parts of the names of kinds whose questions are about text in a picture: `read_row`, `ocr`, `DocVQA`, `scene_text`.
_READING = re.compile(r"(?<![a-z])(read|ocr|text(?!ure)|doc|chart|info(graphic|vqa)|receipt)", re.IGNORECASE)


def named_reading(*names: str) -> bool:
    """True if any name of a kind of question says that it is about text in a picture."""
    return any(_READING.search(name) for name in names)


class PictureFiles(Sequence[Image.Image]):
    """A sequence of picture files, each opened on access, because thousands would not fit into memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> PictureFiles: ...
    def __getitem__(self, index: int | slice) -> Image.Image | PictureFiles:
        return PictureFiles(self.files[index]) if isinstance(index, slice) else open_picture(self.files[index])


def digits_samples(split: str = "test", scenes: int = 80, seed: int = 0) -> list[Sample]:
    """The questions of the digits benchmark: 16 about each of `scenes` pictures, clustered by picture.

    InputError for an unknown split, no scene, or the train split without SciPy, which distorts its digits.
    """
    if scenes < 1:
        raise InputError(f"scenes must be at least 1; got {scenes}")
    with user_input(caught=(ValueError, ImportError)):
        drawn = list(DigitsBenchmark(split, scenes, seed=seed))
    return [
        Sample((one.image,), one.question, (one.answer,), one.kind, str(one.scene), reads_text=named_reading(one.kind))
        for one in drawn
    ]


def reader_samples(split: str = "test", pictures: int = 120, seed: int = 0, questions: int = 6) -> list[Sample]:
    """The questions of the reader benchmark: `questions` about each of `pictures`, by group, clustered by picture.

    InputError for an unknown split.
    """
    with user_input(caught=(ValueError,)):
        drawn = list(ReaderBenchmark(split, pictures, questions, seed))
    samples = []
    for one in drawn:
        reads = named_reading(one.group, one.kind)
        samples.append(Sample((one.image,), one.question, (one.answer,), one.group, str(one.picture), one.kind, reads))
    return samples


def read_samples(file: str | Path, images: str | Path | None = None) -> list[Sample]:
    """The samples of a user's file: a JSON list, or JSON lines, of objects of one of two forms.

    - `{"image": "a.jpg", "question": "Why?", "answer": "So."}`; or `"images"`, a list, and `"answers"`, a list of which
      any is right. `"kind"` groups the scores; `"reads_text"` says whether the answer is read in the picture (by
      default, the kind's name decides). A sample without an answer cannot be scored.
    - The formats of `pyramiddrop train`: LLaVA's `"conversations"` or `"messages"`, with one question and one answer.

    Samples of the same pictures are clustered, or else those with the same `"cluster"`.

    Args:
        images: the folder of relative picture files; None: the folder of the file.

    Raises:
        InputError: if the file cannot be read, or for the first bad sample, as `file[index]: why`.
    """
    path = Path(file)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    with user_input(f"cannot read {path}", (OSError, ValueError)):
        records = list(json_records(path))
    if not records:
        raise InputError(f"{path.name} holds no samples")
    folder = path.parent if images is None else Path(images)
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    samples = []
    for index, record in enumerate(records):
        with user_input(f"{path.name}[{index}]", (BrokenSampleError,)):
            samples.append(_sample(record, folder))
    return samples


def _sample(record: Any, folder: Path) -> Sample:
    if not isinstance(record, Mapping):
        raise BrokenSampleError(f"a sample must be an object; got {type(record).__name__}")
    if "conversations" in record or "messages" in record:
        conversation = read_sample(record, folder)
        roles = [message["role"] for message in conversation.messages]
        if roles != ["user", "assistant"]:
            raise BrokenSampleError(f"a conversation must be one question and one answer; got {', '.join(roles)}")
        question: Any = message_text(conversation.messages[0])
        answers, names = [message_text(conversation.messages[1])], conversation.images
    else:
        names = list(listed(_either(record, "image", "images")))
        question, answers = record.get("question"), _answers(record)
    files = _files(names, folder)
    if not isinstance(question, str) or not question.strip():
        raise BrokenSampleError(f"a question must be text; got {question!r}")
    kind, reads_text = _label(record, "kind") or "all", record.get("reads_text")
    cluster = _label(record, "cluster") or "|".join(map(str, files))
    if reads_text is None:
        reads_text = named_reading(kind)
    elif not isinstance(reads_text, bool):
        raise BrokenSampleError(f'"reads_text" must be true or false; got {reads_text!r}')
    return Sample(PictureFiles(files), question, tuple(answers), kind, cluster, reads_text=reads_text)


def _either(record: Mapping[str, Any], one: str, several: str) -> Any:
    """The record's value under one of two names; None if it has neither."""
    given = [record[name] for name in (one, several) if record.get(name) is not None]
    if len(given) == 2:
        raise BrokenSampleError(f'give "{one}" or "{several}", not both')
    return given[0] if given else None


def _files(names: Sequence[Any], folder: Path) -> list[Path]:
    if not names:
        raise BrokenSampleError('a sample needs a picture: "image" or "images"')
    for name in names:
        if not isinstance(name, str) or not name:
            raise BrokenSampleError(f"a picture must be the name of a file; got {name!r}")
    files = [folder / name for name in names]
    for file in files:
        try:
            check_picture(file)
        except InputError as error:
            raise BrokenSampleError(str(error)) from error
    return files


def _answers(record: Mapping[str, Any]) -> list[str]:
    answers = listed(_either(record, "answer", "answers"))
    for answer in answers:
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise BrokenSampleError(f"an answer must be text or a number; got {answer!r}")
    return list(map(str, answers))


def _label(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise BrokenSampleError(f'"{name}" must be text; got {value!r}')
    return str(value)
