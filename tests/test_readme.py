"""The README's Python, and that of docs/python.md for embeddings, do on the digits model what they say."""

from __future__ import annotations

from typing import Any

from PIL import Image

from documents import ROOT, blocks
from pyramiddrop.assets import digits_checkpoint, digits_images


def python_blocks(page: str) -> list[str]:
    return [block.text for block in blocks(ROOT / page) if block.language == "python"]


def test_the_readme_runs() -> None:
    [code] = python_blocks("README.md")
    code = code.replace("llava-hf/llava-1.5-7b-hf", str(digits_checkpoint())).replace(', device_map="auto"', "")
    code = code.replace("What is this?", "Which digit is red?")  # the model knows no other words
    with Image.open(digits_images()[0]) as image:
        names: dict[str, Any] = {"image": image}
        exec(code, names)
    assert names["trace"].visual_tokens == [64]
    assert names["trace"].cost().flops_ratio < 0.6

    [with_masks] = [code for code in python_blocks("docs/python.md") if "visual_mask=mask" in code]
    exec(with_masks, names)
    assert names["loss"].isfinite()
