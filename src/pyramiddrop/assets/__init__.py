"""Files that come with the library: a small trained LLaVA, pictures to ask it about, and the true answers."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["demo_images", "demo_questions", "digits_checkpoint"]

_HERE = Path(__file__).parent


def digits_checkpoint() -> Path:
    """The folder of the bundled model, in Hugging Face's format; its card is the ``README.md`` in it."""
    return _HERE / "digits"


def demo_images() -> list[Path]:
    """The bundled pictures: scenes of the digits benchmark's test split, which the model never saw."""
    return sorted((_HERE / "images").glob("*.png"))


def demo_questions() -> dict[str, list[dict[str, str]]]:
    """For each bundled picture, by file name: questions with ``kind``, ``question`` and the true ``answer``."""
    questions: dict[str, list[dict[str, str]]] = json.loads((_HERE / "images" / "questions.json").read_text("utf-8"))
    return questions
