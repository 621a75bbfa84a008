"""Files that come with the library: two small trained LLaVAs, pictures to ask one about, and the true answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["demo_images", "demo_questions", "digits_checkpoint", "handwritten_digits", "reader_checkpoint"]

_HERE = Path(__file__).parent


def reader_checkpoint() -> Path:
    """The folder of the bundled model of 576 visual tokens, in Hugging Face's format; its card is its ``README.md``."""
    return _HERE / "reader"


def digits_checkpoint() -> Path:
    """The folder of the small model of 64 visual tokens that the digits benchmark and the tests use, with its card."""
    return _HERE / "digits"


def demo_images() -> list[Path]:
    """The bundled pictures: scenes of the digits benchmark's test split, which the model never saw."""
    return sorted((_HERE / "images").glob("*.png"))


def demo_questions() -> dict[str, list[dict[str, str]]]:
    """For each bundled picture, by file name: questions with ``kind``, ``question`` and the true ``answer``."""
    questions: dict[str, list[dict[str, str]]] = json.loads((_HERE / "images" / "questions.json").read_text("utf-8"))
    return questions


def handwritten_digits() -> tuple[NDArray[Any], NDArray[Any]]:
    """The 1797 digits of scikit-learn's `load_digits`: images (N, 8, 8) from 0 to 16, and labels (N,), both uint8.

    They are the test set of the UCI data set "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak
    (https://doi.org/10.24432/C50P49), licensed CC BY 4.0.
    """
    with np.load(_HERE / "handwritten_digits.npz") as file:
        return file["images"], file["labels"]
