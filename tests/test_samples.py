"""Samples of users' files and of the digits benchmark: every form, and every error by file and index."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pyramiddrop.assets import reader_checkpoint
from pyramiddrop.evaluation.digits import DigitsBenchmark
from pyramiddrop.evaluation.samples import digits_samples, named_reading, read_samples
from pyramiddrop.evaluation.tasks import digits_task, reader_task
from pyramiddrop.inference import InputError

PLAIN = {"image": "a.png", "question": "Why?", "answer": "So."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 4), colour).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def written(folder: Path, *records: Any, name: str = "data.json") -> Path:
    lines = name.endswith(".jsonl")
    text = "\n".join(json.dumps(record) for record in records) if lines else json.dumps(records)
    (folder / name).write_text(text)
    return folder / name


def test_the_plain_form(folder: Path) -> None:
    record = {"images": ["a.png", "b.png"], "question": "Why?", "answers": ["So.", 7], "kind": "reason", "id": 4}
    (sample,) = read_samples(written(folder, record))
    assert (sample.question, sample.answers, sample.kind) == ("Why?", ("So.", "7"), "reason")
    assert [picture.getpixel((0, 0)) for picture in sample.images] == [(255, 0, 0), (0, 0, 255)]
    assert [len(sample.images), len(sample.images[:1])] == [2, 1]


def test_json_lines_and_another_folder(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = written(elsewhere, PLAIN, {**PLAIN, "answer": None}, name="data.jsonl")
    first, second = read_samples(path, folder)
    assert (first.answers, second.answers, first.kind) == (("So.",), (), "all")


def test_what_training_reads_is_read(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "So."}]
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    path = written(folder, {"image": "a.png", "conversations": turns}, {"images": ["a.png"], "messages": messages})
    for sample in read_samples(path):
        assert (sample.question, sample.answers) == ("Why?", ("So.",))
        assert sample.images[0].size == (8, 4)


def test_samples_of_the_same_pictures_are_clustered(folder: Path) -> None:
    records = [PLAIN, {**PLAIN, "question": "How?"}, {**PLAIN, "image": "b.png"}, {**PLAIN, "cluster": 3}]
    clusters = [sample.cluster for sample in read_samples(written(folder, *records))]
    assert clusters[0] == clusters[1] != clusters[2]
    assert clusters[3] == "3"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("Why?", "a sample must be an object; got str"),
        ({"question": "Why?"}, 'a sample needs a picture: "image" or "images"'),
        ({**PLAIN, "images": ["b.png"]}, 'give "image" or "images", not both'),
        ({**PLAIN, "answers": ["No."]}, 'give "answer" or "answers", not both'),
        ({**PLAIN, "image": 3}, "a picture must be the name of a file; got 3"),
        ({**PLAIN, "image": "c.png"}, "no such picture"),
        ({**PLAIN, "image": "text.png"}, "not a picture that can be read"),
        ({"image": "a.png", "answer": "So."}, "a question must be text; got None"),
        ({**PLAIN, "question": " "}, "a question must be text; got ' '"),
        ({**PLAIN, "answer": [["So."]]}, "an answer must be text or a number; got"),
        ({**PLAIN, "answer": True}, "an answer must be text or a number; got True"),
        ({**PLAIN, "answer": ""}, "an answer must be text or a number; got ''"),
        ({**PLAIN, "kind": ["x"]}, "\"kind\" must be text; got ['x']"),
        ({"image": "a.png", "conversations": []}, '"conversations" must be a list of turns'),
        (
            {
                "image": "a.png",
                "messages": [{"role": role, "content": "Why?"} for role in ("user", "assistant", "user", "assistant")],
            },
            "a conversation must be one question and one answer; got user, assistant, user, assistant",
        ),
    ],
)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_broken_sample_is_named_by_file_and_index(folder: Path, record: Any, words: str, name: str) -> None:
    with pytest.raises(InputError) as caught:
        read_samples(written(folder, PLAIN, record, name=name))
    assert str(caught.value).startswith(f"{name}[1]: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("data.json", "{", "cannot read"),
        ("data.json", "{}", "it must be a list of samples; got dict"),
        ("data.json", "[]", "data.json holds no samples"),
        ("data.jsonl", json.dumps(PLAIN) + "\n{", "line 2"),
    ],
)
def test_a_broken_file_is_refused(folder: Path, name: str, text: str, words: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=words):
        read_samples(folder / name)


def test_files_and_folders_that_are_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_samples(folder / "none.json")
    with pytest.raises(InputError, match="no such folder"):
        read_samples(written(folder, PLAIN), folder / "none")


def test_the_digits_are_those_of_the_benchmark() -> None:
    pytest.importorskip("sklearn")
    samples, drawn = digits_samples("val", 2, seed=5), list(DigitsBenchmark("val", 2, seed=5))
    assert len(samples) == 32
    for sample, one in zip(samples, drawn, strict=True):
        assert (sample.question, sample.answers, sample.kind) == (one.question, (one.answer,), one.kind)
        assert (sample.cluster, sample.images[0].tobytes()) == (str(one.scene), one.image.tobytes())


@pytest.mark.parametrize(("arguments", "words"), [(("dev", 1), "split='dev'"), (("val", 0), "at least 1; got 0")])
def test_digits_that_there_are_not(arguments: tuple[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        digits_samples(*arguments)


def test_digits_need_no_scikit_learn_and_training_ones_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyramiddrop.evaluation.digits import digit_bank

    digit_bank.cache_clear()
    for module in ("sklearn", "sklearn.datasets", "scipy"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    assert len(digits_samples("val", 1)) == 16
    with pytest.raises(InputError, match=r"the train split of digits needs SciPy: pip install 'pyramiddrop\[eval\]'"):
        digits_samples("train", 1)


def test_a_limit_spreads_over_pictures() -> None:
    few = digits_task(limit=12).samples
    assert len({sample.cluster for sample in few}) == 12
    more = digits_task(limit=200).samples
    assert sorted(Counter(sample.cluster for sample in more).values()) == [2] * 40 + [3] * 40
    chosen = {(sample.cluster, sample.question) for sample in more}
    everything = [(sample.cluster, sample.question) for sample in digits_task().samples]
    assert [(sample.cluster, sample.question) for sample in more] == [one for one in everything if one in chosen]


def test_the_reader_task_has_groups_and_its_own_model() -> None:
    task = reader_task(limit=6)
    assert task.kinds == ("scenes", "documents", "charts")
    assert [sample.kind for sample in task.samples] == [*task.kinds] * 2
    assert task.bundled == reader_checkpoint()
    with pytest.raises(InputError, match="split='odd' is not one of"):
        reader_task("odd")


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        *((name, True) for name in ("read_row", "ocr", "OCRBench", "text", "scene_text", "DocVQA", "chart")),
        *((name, False) for name in ("spread", "colour_of", "texture", "all", "context", "podcast", "")),
    ],
)
def test_the_name_of_a_kind_says_whether_it_reads(name: str, reads: bool) -> None:
    assert named_reading("other", name) == reads
