"""Train, then serve: what `pyramiddrop train` wrote, and the bundled models, as they are on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")

from PIL import Image
from served import Question, answers, blocks_in_use, engine, processed, scheduler
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from pyramiddrop import Method, PyramidDrop
from pyramiddrop.assets import (
    demo_images,
    demo_questions,
    digits_checkpoint,
    digits_images,
    digits_questions,
    reader_checkpoint,
)
from pyramiddrop.cli.main import app

END = 2  # the token that ends an answer of the bundled models
IN_PARTS = {"max_num_batched_tokens": 256}


def questions_about(folder: Path, pictures: Sequence[Path], asked: dict[str, list[dict[str, str]]]) -> list[Question]:
    """The first two questions about each picture, as the checkpoint's chat template writes them."""
    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for path in pictures:
        for one in asked[path.name][:2]:
            content = [{"type": "image"}, {"type": "text", "text": one["question"]}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            found.append(Question(text, (Image.open(path).convert("RGB"),), 6))
    return found


@torch.inference_mode()
def of_the_adapter(folder: Path, asked: Sequence[Question], method: Method) -> list[list[int]]:
    """The adapter's answers, which end by themselves."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    with method(model):
        return [_answer(model, processed(processor, question), question.tokens) for question in asked]


def _answer(model: Any, inputs: Any, tokens: int) -> list[int]:
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1] :]
    return to_the_end(ids.tolist())


def to_the_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END)] if END in ids else ids


@pytest.mark.parametrize("name", ["digits", "reader"])
def test_the_bundled_models(name: str) -> None:
    """The reader has heads of 48, which vLLM does not compute on a CPU: they are padded."""
    if name == "digits":
        folder = digits_checkpoint()
        asked = questions_about(folder, digits_images(), digits_questions())
    else:
        folder = reader_checkpoint()
        asked = questions_about(folder, demo_images(), demo_questions())
    method = PyramidDrop(lam=0.5)
    with engine(folder, method, max_model_len=512 if name == "digits" else 1024, **IN_PARTS) as llm:
        found = [to_the_end(ids) for ids in answers(llm, asked, every=1)]
        assert blocks_in_use(scheduler(llm)) == 0
    assert found == of_the_adapter(folder, asked, method)
    assert all(found)


def test_what_was_trained_is_served(tmp_path: Path) -> None:
    """With the method that was saved beside the weights."""
    pytest.importorskip("trl", reason="training needs pyramiddrop[train]")
    picture = str(digits_images()[0])
    turns = [{"from": "human", "value": "<image>\nRead row 6."}, {"from": "gpt", "value": "7 0"}]
    data, output = tmp_path / "data.json", tmp_path / "trained"
    data.write_text(json.dumps([{"image": picture, "conversations": turns}] * 4))
    words = f"--model {digits_checkpoint()} --data {data} --output {output} --batch 2 --learning-rate 1e-3 --lam 0.4"
    result = CliRunner().invoke(app, ["train", *words.split()])
    assert result.exit_code == 0, result.output
    method = PyramidDrop.from_pretrained(output)
    assert method.lam == 0.4
    asked = questions_about(output, digits_images(), digits_questions())
    overrides = {"architectures": ["PyramidDropLlavaForConditionalGeneration"]}  # and no method: the saved one
    with engine(output, method, hf_overrides=overrides, **IN_PARTS) as llm:
        found = [to_the_end(ids) for ids in answers(llm, asked, every=1)]
    assert found == of_the_adapter(output, asked, method)
