"""The pieces under the command line: the choice of a method, prompts, answers and times, without a command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pyramiddrop import FastV, Method, PyramidDrop, RandomDrop
from pyramiddrop.cli.options import MethodOptions
from pyramiddrop.inference.answer import ask, compare
from pyramiddrop.inference.checkpoint import load_checkpoint, pick_device, pick_dtype
from pyramiddrop.inference.errors import InputError
from pyramiddrop.inference.prefill_stats import usage, vanilla_usage
from pyramiddrop.inference.prompt import build_inputs, open_picture
from pyramiddrop.inference.resolve import parse_method, resolve_method
from pyramiddrop.inference.timing import time_prefills
from pyramiddrop.report import units
from pyramiddrop.report.tables.runs import usage_line


@pytest.mark.parametrize(
    ("method", "options", "spec", "expected"),
    [
        (None, {}, None, PyramidDrop()),
        ("vanilla", {}, "vanilla", None),
        ("fastv", {"layer": "3", "keep": "0.25"}, "fastv:keep=0.25,layer=3", FastV(layer=3, keep=0.25)),
        ("random", {"lam": "0.6"}, "random:lam=0.6", RandomDrop(lam=0.6)),
        ("fastv:layer=3", {"merge": True}, "fastv:layer=3:merge=true", FastV(layer=3, merge=True)),
        (
            None,
            {"layers": "2,4", "keep": "0.5,0.25"},
            "pyramiddrop:layers=2,4,keep=0.5,0.25",
            PyramidDrop(layers=[2, 4], keep=[0.5, 0.25]),
        ),
        (None, {"positions": "compact"}, "pyramiddrop:positions=compact", PyramidDrop(positions="compact")),
    ],
)
def test_options_beside_a_method_are_words_of_it(
    tmp_path: Path, method: str | None, options: dict[str, Any], spec: str | None, expected: Method | None
) -> None:
    assert MethodOptions(**options).spec(method) == spec
    assert resolve_method(spec, tmp_path, num_layers=8) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vanilla", None),
        ("pyramiddrop", PyramidDrop()),
        ("PyramidDrop:lam=0.6", PyramidDrop(lam=0.6)),
        ("FastV:layer=3", FastV(layer=3)),
        ("RandomDrop", RandomDrop()),
        ("pyramiddrop:merge=true,score=diversity", PyramidDrop(merge=True, score="diversity")),
        ("pyramiddrop:reserve=0.25,random_from=5", PyramidDrop(reserve=0.25, random_from=5)),
        ("pyramiddrop:lam=0.6,stages=3", PyramidDrop(lam=0.6, stages=3)),
        ("pyramiddrop:layers=2/4,keep=0.5/0.25", PyramidDrop(layers=[2, 4], keep=[0.5, 0.25])),
        ("pyramiddrop:layers=3,keep=1", PyramidDrop(layers=[3], keep=[1.0])),
        ("fastv:layer=3:keep=0.25", FastV(layer=3, keep=0.25)),
        ("pyramiddrop:layers=2,4:keep=0.5,0.25", PyramidDrop(layers=[2, 4], keep=[0.5, 0.25])),
        ("random:seed=7,per_image=true", RandomDrop(seed=7, per_image=True)),
        ("random:seed=none,positions=compact", RandomDrop(seed=None, positions="compact")),
    ],
)
def test_a_method_in_one_word(text: str, expected: Method | None) -> None:
    assert parse_method(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pyramid", "method 'pyramid' is not one of pyramiddrop, fastv, random, uniform"),
        ("vanilla:lam=0.5", "vanilla drops no tokens and has no options; got 'vanilla:lam=0.5'"),
        ("fastv:lam=0.5", "lam does not belong to the method 'fastv'"),
        ("fastv:rank_layer=next", "rank_layer does not belong to the method 'fastv'"),
        ("pyramiddrop:lam=0.5,keep=0.5", "give lam or keep, not both"),
        ("pyramiddrop:lam=0.5,lam=0.6", "'pyramiddrop:lam=0.5,lam=0.6' gives lam twice"),
        ("pyramiddrop:0.5", "'0.5' in 'pyramiddrop:0.5' is no option of a method"),
        ("pyramiddrop:lam=half", "lam in 'pyramiddrop:lam=half' must be a number; got 'half'"),
        ("pyramiddrop:stages=2.5", "must be a whole number; got '2.5'"),
        ("pyramiddrop:layers=2/x", "must be a whole number, or several with slashes between them, or none; got '2/x'"),
        ("pyramiddrop:per_image=maybe", "must be true or false; got 'maybe'"),
        ("fastv:keep=0.5/0.25", "must be a number; got '0.5/0.25'"),
        ("pyramiddrop:lam=2", "method 'pyramiddrop:lam=2': lam must be a number in (0, 1]; got 2.0"),
    ],
)
def test_a_method_in_a_wrong_word(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_method(text)
    assert words in str(caught.value)


def test_a_method_must_fit_the_depth(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layers must be in 1\.\.3"):
        resolve_method("pyramiddrop:layers=4", tmp_path, num_layers=4)


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
