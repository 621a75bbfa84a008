"""What is under the command line: prompts, pictures, answers, times and units, without a command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pyramiddrop import FastV, PyramidDrop
from pyramiddrop.inference.answer import ask, compare
from pyramiddrop.inference.checkpoint import load_checkpoint, pick_device, pick_dtype
from pyramiddrop.inference.prefill_stats import usage, vanilla_usage
from pyramiddrop.inference.prompt import build_inputs, open_picture
from pyramiddrop.inference.timing import time_prefills
from pyramiddrop.report import units
from pyramiddrop.report.tables.runs import usage_line


def test_an_answer_is_that_of_generate(llava_folder: Path, picture: Path) -> None:
    checkpoint = load_checkpoint(llava_folder, device="cpu")
    inputs = build_inputs(checkpoint.processor, [open_picture(picture)], "w7 w8")
    ids = checkpoint.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    plain = ask(checkpoint, inputs, None, max_new_tokens=4)
    assert plain.text == checkpoint.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    assert plain.trace is None
    kept = ask(checkpoint, inputs, PyramidDrop(lam=1.0), max_new_tokens=4)
    assert kept.text == plain.text
    assert kept.trace is not None
    assert usage(kept.trace).kv_bytes == vanilla_usage(checkpoint.model, inputs).kv_bytes


def test_vanilla_costs_what_the_trace_says(llava_folder: Path, picture: Path) -> None:
    checkpoint = load_checkpoint(llava_folder, device="cpu")
    inputs = build_inputs(checkpoint.processor, [open_picture(picture)], "w7 w8")
    answer = ask(checkpoint, inputs, PyramidDrop(), max_new_tokens=1)
    assert answer.trace is not None
    plain, cost = vanilla_usage(checkpoint.model, inputs), answer.trace.cost()
    assert (plain.flops, plain.kv_bytes) == (cost.vanilla_flops, cost.vanilla_kv_bytes)
    assert plain.tokens_by_stage == [16]
    assert usage(answer.trace).tokens_by_stage == [16, 8, 4, 2]


def test_a_prompt_has_one_start_token_and_its_picture_first(llava_folder: Path) -> None:
    processor = load_checkpoint(llava_folder, device="cpu").processor
    picture = Image.new("RGB", (40, 40))
    inputs = build_inputs(processor, [picture], "w7")
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert words == ["<s>", "<unk>", *["<image>"] * 16, "w7", "<unk>"]  # "user", the picture, the question, "assistant"
    processor.chat_template = None
    plain = build_inputs(processor, [picture, picture], "w7")["input_ids"]
    assert int((plain == processor.image_token_id).sum()) == 32


def test_a_picture_is_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    lying = Image.new("L", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    lying.save(tmp_path / "photo.jpg", exif=exif)
    upright = open_picture(tmp_path / "photo.jpg")
    assert (upright.size, upright.mode) == ((20, 40), "RGB")


def test_times_are_taken_for_each_way_and_leave_nothing_behind(llava_folder: Path, picture: Path) -> None:
    checkpoint = load_checkpoint(llava_folder, device="cpu")
    inputs = build_inputs(checkpoint.processor, [open_picture(picture)], "w7 w8")
    times = time_prefills(checkpoint.model, inputs, {"vanilla": None, "fastv": FastV()}, runs=2)
    assert set(times) == {"vanilla", "fastv"}
    assert min(time.wall for time in times.values()) > 0
    with PyramidDrop()(checkpoint.model):  # would refuse if a method were still there
        pass


def test_devices_and_dtypes() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None).type in ("cuda", "mps", "cpu")
    assert pick_dtype(torch.device("cpu"), None) == torch.float32
    assert pick_dtype(torch.device("mps"), None) == torch.float16
    assert pick_dtype(torch.device("cpu"), "float16") == torch.float16
    assert pick_dtype(torch.device("cpu"), "auto") == "auto"


def test_units() -> None:
    assert units.flops(241_000_000) == "241 MFLOPs"
    assert units.flops(12) == "12.0 FLOPs"
    assert units.flops(4.2e12) == "4.20 TFLOPs"
    assert units.size(552 * 1024) == "552 KiB"
    assert units.seconds(0.0123) == "12.3 ms"
    assert units.seconds(1.234) == "1.23 s"
    assert units.share(0.5349) == "53 %"
    assert units.arrow([64, 32, 16]) == "64 → 32 → 16"
    assert units.flops(float("nan")) == units.share(float("nan")) == "not known"


def test_a_text_model_of_unknown_sizes_still_answers(
    llava_folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pyramiddrop.hf.model_info"], "TEXT_MODELS", ())
    checkpoint = load_checkpoint(llava_folder, "cpu", "float32")
    inputs = build_inputs(checkpoint.processor, [open_picture(picture)], "What?")
    found = compare(checkpoint, inputs, PyramidDrop(), 2, runs=1)
    assert found.pruned.usage.tokens_by_stage == [16, 8, 4, 2]
    assert found.as_dict()["flops_ratio"] is found.as_dict()["pruned"]["kv_bytes"] is None
    json.dumps(found.as_dict(), allow_nan=False)
    assert "not known" in usage_line(found.pruned.usage, found.vanilla.usage)
