"""Bundled files: two small trained LLaVAs, each with pictures, questions and true answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "demo_images",
    "demo_questions",
    "digits_checkpoint",
    "digits_images",
    "digits_questions",
    "handwritten_digits",
    "reader_checkpoint",
]

_HERE = Path(__file__).parent
#: The questions of each picture, by file name, with ``kind``, ``question`` and the true ``answer``.
Questions = dict[str, list[dict[str, str]]]


def reader_checkpoint() -> Path:
    """The folder of the bundled model with 576 visual tokens, in Hugging Face's format; ``README.md`` is its card."""
    return _HERE / "reader"


def demo_images() -> list[Path]:
    """The demo's pictures: a scene, a document and a chart of the reader benchmark's test split."""
    return [_HERE / "images" / name for name in demo_questions()]


def demo_questions() -> Questions:
    """The questions of each picture of the demo; one that PyramidDrop answers wrongly has a ``why``."""
    return _questions(_HERE / "images")


def digits_checkpoint() -> Path:
    """The folder of the small model with 64 visual tokens, for the digits benchmark and for tests."""
    return _HERE / "digits"


def digits_images() -> list[Path]:
    """Pictures for the small model: scenes of the digits benchmark's test split."""
    return [_HERE / "digits_images" / name for name in digits_questions()]


def digits_questions() -> Questions:
    """The questions of each of :func:`digits_images`."""
    return _questions(_HERE / "digits_images")


def _questions(folder: Path) -> Questions:
    questions: Questions = json.loads((folder / "questions.json").read_text("utf-8"))
    return questions


def handwritten_digits() -> tuple[NDArray[Any], NDArray[Any]]:
    """The 1797 digits of scikit-learn's `load_digits`: images (N, 8, 8) from 0 to 16, and labels (N,), both uint8.

    They are the test set of the UCI data set "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak
    (https://doi.org/10.24432/C50P49), licensed CC BY 4.0.
    """
    with np.load(_HERE / "handwritten_digits.npz") as file:
        return file["images"], file["labels"]
