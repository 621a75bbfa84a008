"""Smaller pictures for processors with a pixel budget: sizes and pixels are the processor's own at a smaller budget,
and replies are those to pictures that were so resized by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLProcessor
from typer.testing import CliRunner

from pyramiddrop import Downsample, PyramidDrop, UnsupportedModelError
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.cli.main import app
from pyramiddrop.evaluation import run as run_module
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.inference.checkpoint import Checkpoint, load_processor
from pyramiddrop.inference.downsampling import ANY_SIZE, downsample, has_pixel_budget, split_downsampling
from pyramiddrop.inference.prompt import build_inputs
from spot_probe import word_tokenizer

pytest.importorskip("transformers", minversion="5.23")

from spot_probe_grids import GRIDS, SIZE
from zoo import MEMBERS
from zoo.weights import END, IMAGE, START, VIDEO

INSIDE = PyramidDrop(layers=[2, 4], keep=[0.5, 0.25])
#: Hunyuan's newlines are visual tokens, too: its processor does not tell how many there are.
BUDGETED = sorted({kind: name for name, kind in GRIDS.items() if name != "hunyuan_vl"}.values())
MARKS = {"<|vision_start|>": START, "<|vision_end|>": END, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


SIZES = [(64, 64), (70, 41), (200, 9), (11, 10)]
SAMPLES = [
    Sample((picture(64, 64),), "w7"),
    Sample((picture(70, 41, 1), picture(24, 60, 2)), "w8 w9 w10 w11 w12"),
    Sample((picture(10, 10, 3),), "w9 w3 w4"),
]


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    """A tiny Qwen2-VL; a processor of pictures alone, for that of videos needs torchvision."""
    with patch.object(Qwen2VLProcessor, "check_argument_for_proper_class"):
        processor = Qwen2VLProcessor(GRIDS["qwen2_vl"](), word_tokenizer(MARKS), None, chat_template=TEMPLATE)
    return Checkpoint(MEMBERS["qwen2_vl"].build(0), processor, "tiny")


def resized(images: Any, pixels: int, image: Image.Image) -> Any:
    """What the processor makes of a picture at a budget of so many pixels."""
    return images(images=[image], size={"shortest_edge": pixels, "longest_edge": pixels}, return_tensors="pt")


def told(images: Any, pixels: int, image: Image.Image) -> int:
    """How many tokens the processor says that a picture has at a budget of so many pixels."""
    bounds = {"min_pixels": pixels, "max_pixels": pixels, "size": {"shortest_edge": pixels, "longest_edge": pixels}}
    return int(images.get_number_of_image_patches(image.height, image.width, bounds)) // images.merge_size**2


def count(images: Any, found: Any) -> int:
    return int(found["image_grid_thw"][0].prod()) // images.merge_size**2


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("keep", [1.0, 0.5, 0.33, 0.01])
@pytest.mark.parametrize("family", BUDGETED)
def test_a_picture_is_as_large_as_the_processor_allows_for_so_many_tokens(family: str, keep: float) -> None:
    """Against all budgets that the processor can be given."""
    images = GRIDS[family]()
    processor: Any = type("Processor", (), {"image_processor": images})
    for image in [picture(*size) for size in SIZES]:
        whole = count(images, images(images=[image], return_tensors="pt"))
        allowed = max(1, int(whole * keep))
        (small,) = downsample(processor, [image], keep)
        found = images(images=[small], size=ANY_SIZE, return_tensors="pt")
        best = max(pixels for pixels in range(1, 3 * SIZE["longest_edge"]) if told(images, pixels, image) <= allowed)
        expected = resized(images, best, image)
        assert found["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
        assert count(images, found) <= allowed
        torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], rtol=0, atol=0)


def test_only_a_processor_with_a_pixel_budget_takes_the_share(tiny: Checkpoint) -> None:
    fixed = load_processor(digits_checkpoint())
    assert has_pixel_budget(tiny.processor)
    assert not has_pixel_budget(fixed)
    small = Downsample(keep=0.3)
    assert split_downsampling(small, tiny.processor) == (0.3, None)
    assert split_downsampling(small | INSIDE, tiny.processor) == (0.3, INSIDE)
    for method in (None, INSIDE, small, small | INSIDE):
        assert split_downsampling(method, fixed) == (None, method)
    for method in (None, INSIDE):
        assert split_downsampling(method, tiny.processor) == (None, method)
    with pytest.raises(UnsupportedModelError, match="give the processor fewer pixels"), small(tiny.model):
        pass


@pytest.mark.parametrize(
    "method", [pytest.param(Downsample(keep=0.4), marks=pytest.mark.slow), Downsample(keep=0.4) | INSIDE]
)
def test_replies_are_those_to_pictures_resized_by_hand(tiny: Checkpoint, method: Any) -> None:
    """In batches and alone; and the tokens are those that the processor makes of the small pictures."""
    _, inside = split_downsampling(method, tiny.processor)
    answerer = Answerer(tiny, batch=3, max_new_tokens=2)
    replies = answerer.answers(SAMPLES, method)
    assert replies == Answerer(tiny, batch=1, max_new_tokens=2).answers(SAMPLES, method)
    assert replies == list(answerer.answers_by_method(SAMPLES, [None, INSIDE, method]))[2]
    hand = [replace(one, images=downsample(tiny.processor, one.images, 0.4)) for one in SAMPLES]
    bounds = tiny.processor.image_processor.size
    try:
        tiny.processor.image_processor.size = ANY_SIZE
        expected = answerer.answers(hand, inside)
        inputs = [build_inputs(tiny.processor, list(one.images), one.question) for one in hand]
    finally:
        tiny.processor.image_processor.size = bounds
    whole = answerer.answers(SAMPLES)
    for reply, own, plain, tensors in zip(replies, expected, whole, inputs, strict=True):
        assert (reply.text, reply.usage.flops, reply.usage.kv_bytes) == (own.text, own.usage.flops, own.usage.kv_bytes)
        assert reply.vanilla == plain.usage != reply.usage
        assert reply.usage.tokens_by_stage == [plain.usage.visual_tokens, *own.usage.tokens_by_stage]
        small = int(tensors["image_grid_thw"].prod(1).sum()) // 4
        assert reply.usage.tokens_by_stage[1] == small <= 0.4 * plain.usage.visual_tokens
        assert reply.usage.stages[0].layer == 0
    assert [reply.text for reply in replies] != [plain.text for plain in whole]


@pytest.fixture
def asked(tmp_path: Path, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Questions about pictures of several sizes, asked of the tiny model."""
    records = []
    for number, (width, height) in enumerate([(64, 64), (70, 41), (40, 64), (64, 33)]):
        picture(width, height, number).save(tmp_path / f"{number}.png")
        records.append({"image": f"{number}.png", "question": "w7 w8", "answer": "w1"})
    (tmp_path / "data.json").write_text(json.dumps(records))
    monkeypatch.setattr(run_module, "load_checkpoint", lambda *_: tiny)
    return tmp_path / "data.json"


@pytest.mark.parametrize("control", ["downsample", pytest.param("--controls", marks=pytest.mark.slow)])
def test_eval_asks_the_control_of_a_qwen_like_model(asked: Path, control: str) -> None:
    """At the budget of the others, and timed on its own pictures."""
    words = ["--model", "tiny", "--data", str(asked), "--method", "pyramiddrop:layers=2/4,keep=0.5/0.25", control]
    words += ["--batch", "2", "--max-new-tokens", "1", "--rounds", "1", "--average-tokens", "16"]
    result = CliRunner().invoke(app, ["eval", "--device", "cpu", *words, "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    record = json.loads(result.stdout)
    assert record["left_out"] == {}
    (small,) = [one for one in record["methods"] if one["name"].startswith("Downsample")]
    whole, left = small["visual_tokens"]["by_stage"]
    assert small["visual_tokens"]["drop_layers"] == [0]
    assert 0 < left == small["visual_tokens"]["per_layer"] <= 16 < whole
    assert small["flops_ratio"] < 1
    assert all(one["group_a"]["count"] == 4 for one in record["methods"])
    assert small["prefill"]["ratio"] > 0
