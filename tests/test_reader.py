"""The reader benchmark, the bundled model of 576 visual tokens, its demo questions, and the script that trained it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pyramiddrop import PyramidDrop
from pyramiddrop.assets import demo_images, demo_questions, reader_checkpoint
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.digits import SPLITS
from pyramiddrop.evaluation.reader import GROUPS, KINDS, Picture, Question, ReaderBenchmark, charts, documents
from pyramiddrop.evaluation.reader.canvas import CHANNELS, PLACES, RGB, SHAPES, UNLABELLED, layouts_of
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint, load_processor
from pyramiddrop.inference.request import bundled_remarks

EXAMPLES = Path(__file__).parents[1] / "examples"

# The pictures and their questions


def test_a_picture_depends_on_its_number_alone() -> None:
    few, many = list(ReaderBenchmark("val", 2, 3, seed=5)), list(ReaderBenchmark("val", 4, 3, seed=5))
    for one, other in zip(few, many[: len(few)], strict=True):
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
        assert (one.kind, one.question, one.answer) == (other.kind, other.question, other.answer)
    assert [sample.group for sample in many[::3]] == ["scenes", "documents", "charts", "scenes"]
    assert not np.array_equal(*(ReaderBenchmark("val", 1, 3, seed=seed).drawn(0)[1].pixels for seed in (5, 6)))


@pytest.mark.parametrize("pair", list(combinations(SPLITS, 2)))
def test_splits_share_neither_layouts_nor_pictures(pair: tuple[str, str]) -> None:
    for group in (charts, documents):
        first, second = ({repr(layout) for layout in layouts_of(split, group.LAYOUTS, group.ORDER)} for split in pair)
        assert first
        assert not first & second
    drawn = [ReaderBenchmark(split, 1, 1).drawn(0)[1].pixels for split in pair]
    assert not np.array_equal(*drawn)


@lru_cache(maxsize=1)
def drawn() -> list[tuple[str, Picture]]:
    benchmark = ReaderBenchmark("test", 36, seed=11)
    return [benchmark.drawn(index)[:2] for index in range(benchmark.pictures)]


def test_every_kind_is_asked() -> None:
    for group, kinds in KINDS.items():
        asked = {question.kind for name, picture in drawn() for question in picture.questions if name == group}
        assert asked == set(kinds)


def shown(picture: Picture, **wanted: str) -> list[dict[str, str]]:
    """What each patch with the wanted words shows, from the labels that are painted with the pixels."""
    words = [
        {name: CHANNELS[name][code] for name, code in zip(CHANNELS, row, strict=True) if code != UNLABELLED}
        for row in picture.labels
    ]
    return [one for one in words if all(one.get(name) == word for name, word in wanted.items())]


def number(picture: Picture, owner: str) -> str:
    """The number whose digits belong to a field or a bar."""
    digits = {one["side"]: one["content"] for one in shown(picture, owner=owner)}
    return "".join(digits[place] for place in PLACES if place in digits)


def one_of(values: list[str]) -> str:
    (value,) = set(values)
    return value


def told(picture: Picture, question: Question) -> str | None:
    """The answer as the painted patches tell it; None for the kinds that need more than a look at them."""
    words = question.text.rstrip("?.").split()
    if question.kind in ("field_value", "bar_value"):
        return number(picture, words[-1])
    if question.kind == "colour_of":
        return one_of([one["colour"] for one in shown(picture, content=words[-1])])
    if question.kind == "digit_of":
        digits = [one["content"] for one in shown(picture, colour=words[-1]) if one["content"] not in SHAPES]
        return one_of(digits)
    if question.kind == "where":
        return one_of([f"{one['height']} {one['side']}" for one in shown(picture, content=words[-1])])
    if question.kind in ("highest", "lowest"):
        return one_of([one["owner"] for one in shown(picture, height=question.kind)])
    if question.kind == "bar_colour":
        return one_of([one["colour"] for one in shown(picture, owner=words[-1])])
    if question.kind in ("line_word", "read_line"):
        line = [one for one in shown(picture, height=" ".join(words[-2:])) if one["owner"] == CHANNELS["owner"][0]]
        word = one_of([one["content"] for one in line])
        return word if question.kind == "line_word" else f"{word} {number(picture, word)}"
    if question.kind == "title":
        return one_of([one["content"] for one in shown(picture) if one["content"] in documents.TITLES])
    return None


def test_answers_are_true_of_what_is_drawn() -> None:
    checked = 0
    for _, picture in drawn():
        for question in picture.questions:
            answer = told(picture, question)
            assert answer in (None, question.answer), question
            checked += answer is not None
    assert checked > 200


def test_a_bar_has_the_colour_of_its_answer() -> None:
    names = list(RGB)
    for group, picture in drawn():
        tiles = picture.pixels.reshape(24, 14, 24, 14, 3).transpose(0, 2, 1, 3, 4).reshape(576, -1, 3)
        for question in picture.questions if group == "charts" else ():
            if question.kind == "bar_colour":
                label = CHANNELS["owner"].index(question.text.rstrip("?").split()[-1])
                pixels = np.median(tiles[picture.labels[:, 4] == label].reshape(-1, 3), axis=0)
                shades = [np.array(RGB[name]) / max(RGB[name]) for name in names]
                distance = [np.abs(pixels / max(pixels.max(), 1) - shade).sum() for shade in shades]
                assert names[int(np.argmin(distance))] == question.answer


# The bundled model


@lru_cache(maxsize=1)
def reader() -> Checkpoint:
    return load_checkpoint(reader_checkpoint(), "cpu")


def test_the_bundled_model_has_the_geometry_of_llava_and_fits_the_repository() -> None:
    model = reader().model
    assert model.dtype == torch.float32
    assert model.config.image_seq_length == 576
    assert reader().num_layers == 12
    assert sum(file.stat().st_size for file in reader_checkpoint().iterdir()) <= 16e6


def test_the_bundled_model_answers_held_out_questions_with_and_without_dropping() -> None:
    samples = [
        Sample((one.image,), one.question, (one.answer,), one.kind, str(one.picture))
        for one in ReaderBenchmark("test", 3, 2, seed=3)
    ]
    answerer = Answerer(reader(), batch=6, max_new_tokens=6)
    plain, pruned = answerer.answers(samples), answerer.answers(samples, PyramidDrop())
    assert [reply.text for reply in plain] == [sample.answers[0] for sample in samples]
    assert sum(reply.text == sample.answers[0] for reply, sample in zip(pruned, samples, strict=True)) >= 5
    assert pruned[0].usage.tokens_by_stage == [576, 288, 144, 72]
    assert sum(one.usage.flops for one in pruned) < 0.5 * sum(one.usage.flops for one in plain)


def test_the_demo_pictures_are_of_the_test_split() -> None:
    asked = demo_questions()
    assert [image.name for image in demo_images()] == list(asked)
    benchmark = ReaderBenchmark("test", len(GROUPS), seed=2024)
    for index, (image, questions) in enumerate(zip(demo_images(), asked.values(), strict=True)):
        _, picture, _ = benchmark.drawn(index)
        shift = np.abs(np.asarray(Image.open(image), np.int16) - picture.pixels)
        assert shift.mean() < 1  # fonts are drawn a little differently by other releases of Pillow
        truth = {(one.kind, one.text, one.answer) for one in picture.questions}
        assert {(one["kind"], one["question"], one["answer"]) for one in questions} <= truth
    assert sum("why" in one for questions in asked.values() for one in questions) == 1


@pytest.mark.parametrize(
    ("prompt", "size", "said"),
    [
        ("Which digit is white?", 336, []),
        ("How many things are coloured?", 336, []),
        ("What is this?", 336, ["no word of 'What is this?' means anything"]),
        ("Where is the elephant?", 336, ["vocabulary: 'elephant'"]),
        ("Is there a star?", 200, ["a picture of 200 x 200 is resized to 336 x 336"]),
    ],
)
def test_what_the_bundled_model_cannot_know_is_remarked(prompt: str, size: int, said: list[str]) -> None:
    found = bundled_remarks(load_processor(reader_checkpoint()), prompt, [Image.new("RGB", (size, size))])
    assert len(found) == len(said)
    assert all(part in remark for part, remark in zip(said, found, strict=True))


# The training script


@pytest.fixture
def example() -> Iterator[None]:
    """Import what lies in `examples/reader`, and forget it: `examples/digits` has modules of the same names."""
    before, paths = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(EXAMPLES / "reader"))
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(EXAMPLES) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.mark.usefixtures("example")
def test_a_tiny_training_ends_in_a_checkpoint_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export_reader import export
    from train_reader import LOG, WEIGHTS, main

    words = "--steps 4 --batch 1 --align-batch 2 --align 0.5 --pool 32 --workers 0 --val-pictures 3 --device cpu"
    sizes = "--hidden 32 --layers 4 --tower-layers 1"
    monkeypatch.setattr(sys, "argv", ["train_reader.py", "--out", str(tmp_path), *words.split(), *sizes.split()])
    main()
    log = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert log[-1]["event"] == "finished"
    assert log[-1]["step"] == 4
    assert set(log[-1]["groups"]) == set(GROUPS)

    assert export(tmp_path / WEIGHTS, tmp_path / "checkpoint") < 1e-3
    (sample,) = ReaderBenchmark("val", 1, 1)
    asked = SimpleNamespace(images=(sample.image,), question=sample.question)
    (reply,) = Answerer(load_checkpoint(tmp_path / "checkpoint", "cpu"), 1, 2).answers([asked])
    assert reply.usage.visual_tokens == 576
