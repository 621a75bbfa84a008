"""The README's Python runs as it stands, with the bundled model in the place of the one that must be downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pyramiddrop.assets import digits_checkpoint, digits_images

ROOT = Path(__file__).parents[1]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_runs() -> None:
    first, second = (
        block.replace("llava-hf/llava-1.5-7b-hf", str(digits_checkpoint())).replace(', device_map="auto"', "")
        for block in python_blocks()
    )
    with Image.open(digits_images()[0]) as image:
        names: dict[str, Any] = {"image": image}
        exec(first, names)
    assert names["trace"].visual_tokens == [64]
    assert names["trace"].cost().flops_ratio < 0.6

    inputs = names["inputs"]
    visual = inputs["input_ids"] == names["model"].config.image_token_id
    names |= {
        "mask": visual,
        "embeds": names["model"].get_input_embeddings()(inputs["input_ids"]),
        "attention": inputs["attention_mask"],
        "labels": inputs["input_ids"].masked_fill(torch.arange(visual.shape[1]) < visual.shape[1] - 2, -100),
    }
    setup, with_masks = second.split("with PyramidDrop()(model, visual_mask=mask)")
    exec(setup, names)
    names["remove"](names["model"])
    exec("with PyramidDrop()(model, visual_mask=mask)" + with_masks, names)
    assert names["loss"].isfinite()


def test_the_files_that_the_readme_links_to_are_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
