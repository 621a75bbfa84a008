"""Samples: what is read from LLaVA's conversations and from messages, and what is wrong with the broken ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from checkpoints import save_picture

datasets = pytest.importorskip("datasets")

from pyramiddrop.inference import InputError  # noqa: E402
from pyramiddrop.inference.checkpoint import load_processor  # noqa: E402
from pyramiddrop.inference.prompt import open_picture  # noqa: E402
from pyramiddrop.training import dataset  # noqa: E402
from pyramiddrop.training.collate import AnswerCollator, image_size, plain_messages  # noqa: E402
from pyramiddrop.training.dataset import load_samples  # noqa: E402
from pyramiddrop.training.samples import BrokenSampleError, read_sample  # noqa: E402

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def llava(*values: str, image: Any = "a.png") -> dict[str, Any]:
    """LLaVA's record of turns that alternate, the human first."""
    speakers = ("human", "gpt") * len(values)
    turns = [{"from": speaker, "value": value} for speaker, value in zip(speakers, values, strict=False)]
    return {"id": 7, "conversations": turns} | ({"image": image} if image else {})


def messages(*contents: Any, images: Any = ("a.png",)) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": turns, "images": list(images)}


def test_llava_conversations() -> None:
    record = llava("<image>\nw5 w6", "w7", "w8\n<image>", "w9", image=["a.png", "b/c.png"])
    sample = read_sample(record, Path("/pictures"))
    assert sample.images == ["/pictures/a.png", "/pictures/b/c.png"]
    assert sample.messages == [
        {"role": "user", "content": [IMAGE, text("w5 w6")]},
        {"role": "assistant", "content": [text("w7")]},
        {"role": "user", "content": [text("w8"), IMAGE]},
        {"role": "assistant", "content": [text("w9")]},
    ]


def test_messages_are_the_same_sample() -> None:
    as_text = messages("<image>\nw5", "w7")
    as_parts = messages([IMAGE, text("w5")], [text("w7")])
    placeless = messages("w5", "w7")
    assert (
        read_sample(as_text) == read_sample(as_parts) == read_sample(placeless) == read_sample(llava("<image>w5", "w7"))
    )


def test_a_system_turn_and_no_image() -> None:
    record = {"messages": [{"role": "system", "content": "w4"}, *messages("w5", "w6")["messages"]]}
    sample = read_sample(record)
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant"]
    assert sample.images == []


BROKEN: dict[str, tuple[Any, str]] = {
    "no object": ("w5", "must be an object"),
    "no conversation": ({"image": "a.png"}, '"conversations" or "messages"'),
    "no turns": ({"messages": []}, "list of turns"),
    "an image too many": (llava("<image>\n<image>\nw5", "w6"), "2 <image> for 1 images"),
    "an image too few": (llava("<image>\nw5", "w6", image=["a.png", "b.png"]), "1 <image> for 2 images"),
    "a place without an image": (llava("<image>\nw5", "w6", image=None), "1 <image> for 0 images"),
    "an image in the answer": (llava("w5", "<image> w6"), "an answer holds"),
    "answers itself": ({"conversations": llava("w5", "w6")["conversations"][::-1]}, "take turns"),
    "no answer": (llava("w5", "w6", "w7"), "take turns"),
    "unknown speaker": ({"conversations": [{"from": "bot", "value": "w5"}]}, "got 'bot'"),
    "unknown role": ({"messages": [{"role": "tool", "content": "w5"}]}, "got 'tool'"),
    "an empty answer": (llava("<image>\nw5", " "), "a turn of the assistant is empty"),
    "no text": (llava("<image>\nw5", 5), "must be text"),  # type: ignore[arg-type]
    "nothing said": ({"conversations": [{"from": "human"}]}, 'no "value"'),
    "a video": (messages([{"type": "video"}, text("w5")], "w6"), "'video' is not supported"),
    "an empty image": (messages("<image>w5", "w6", images=[None]), "an image is empty"),
    "no name": (llava("<image>w5", "w6", image=[""]), "an image is empty"),
    "nothing undecoded": (messages("<image>w5", "w6", images=[{"bytes": None, "path": None}]), "an image is empty"),
    "a truth": (llava("<image>w5", "w6", image=True), "an image must be the name of a file, .*; got True"),
    "a number": (llava("<image>w5", "w6", image=3), "got 3"),
    "a list in a list": (messages("<image>w5", "w6", images=[["a.png"]]), r"got \['a.png'\]"),
    "an array": (messages("<image>w5", "w6", images=[np.zeros((2, 2))]), "got array"),
    "a path that is none": (messages("<image>w5", "w6", images=[{"path": 3}]), "got 3"),
    "a video as text": (llava("<video>\nw5", "w6", image=None), "holds a <video>; videos are not supported; give fra"),
    "a video as a part's text": (messages([text("<video> w5")], "w6", images=[]), "holds a <video>"),
    "a video beside it": (llava("w5", "w6", image=None) | {"video": "a.mp4"}, "videos are not supported"),
    "videos beside it": (messages("w5", "w6", images=[]) | {"videos": ["a.mp4"]}, "videos are not supported"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_samples_say_why(case: str) -> None:
    record, reason = BROKEN[case]
    with pytest.raises(BrokenSampleError, match=reason):
        read_sample(record)


# --- From files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def collator(llava_folder: Path) -> AnswerCollator:
    return AnswerCollator(load_processor(llava_folder))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good samples at 0 and 4; broken ones between them."""
    save_picture(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    records = [
        llava("<image>\nw5", "w6"),
        llava("<image>\nw5", "w6", image="missing.png"),
        llava("<image>\nw5", "w6", image="text.png"),
        llava("<image>\n" + "w5 " * 40, "w6"),
        llava("w5", "w6 w7", image=None),
        llava("w5", "w6", "w7"),
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records))
    return path


def test_broken_samples_are_counted_with_file_and_index(mixed: Path, collator: AnswerCollator) -> None:
    table, report = load_samples(mixed, collator, max_length=40, skip_broken=True)
    assert report.good == len(table) == 2
    assert [line.split(":")[0] for line in report.broken] == [f"train.json[{index}]" for index in (1, 2, 3, 5)]
    for line, reason in zip(report.broken, ["no such picture", "cannot read", "60 tokens", "take turns"], strict=True):
        assert reason in line
    assert [len(row["images"]) for row in table] == [1, 0]


def test_the_first_broken_sample_is_fatal_unless_told_otherwise(mixed: Path, collator: AnswerCollator) -> None:
    with pytest.raises(InputError, match=r"train\.json\[1\]: no such picture: .*missing\.png"):
        load_samples(mixed, collator)


def test_lengths_are_those_of_the_batch(mixed: Path, collator: AnswerCollator) -> None:
    table, _ = load_samples(mixed, collator, max_length=40, skip_broken=True)
    rows = [int(collator([row])["attention_mask"].sum()) for row in table]
    assert table["length"][:] == rows


def test_lengths_of_tiled_images(next_folder: Path, tmp_path: Path) -> None:
    collator = AnswerCollator(load_processor(next_folder))
    for number, (width, height) in enumerate([(30, 90), (200, 40), (64, 64)]):
        save_picture(tmp_path / f"{number}.png", width, height)
    path = tmp_path / "train.json"
    path.write_text(json.dumps([llava("<image>\nw5", "w6", image=f"{number}.png") for number in range(3)]))
    table, _ = load_samples(path, collator)
    rows = [int(collator([row])["attention_mask"].sum()) for row in table]
    assert table["length"][:] == rows
    assert len(set(rows)) > 1


def test_a_picture_that_lies_on_its_side_counts_upright(next_folder: Path, tmp_path: Path) -> None:
    collator = AnswerCollator(load_processor(next_folder))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 40)).save(tmp_path / "a.jpg", exif=exif)
    path = tmp_path / "train.json"
    path.write_text(json.dumps([llava("<image>\nw5", "w6", image="a.jpg")]))
    table, _ = load_samples(path, collator)
    assert table["length"][0] == int(collator([table[0]])["attention_mask"].sum())


def test_images_elsewhere_and_json_lines(tmp_path: Path, collator: AnswerCollator) -> None:
    (tmp_path / "pictures").mkdir()
    save_picture(tmp_path / "pictures" / "a.png")
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(llava("<image>\nw5", "w6")) + "\n\n" + json.dumps(messages("w5", "w6")) + "\n")
    table, report = load_samples(path, collator, images=tmp_path / "pictures")
    assert report.good == 2
    assert plain_messages(table[0]["messages"]) == plain_messages(table[1]["messages"])


@pytest.mark.parametrize("column", ["images", "image"])
def test_pictures_inside_a_data_set(column: str, tmp_path: Path, collator: AnswerCollator) -> None:
    picture = Image.new("RGB", (40, 30), "red")
    rows = [
        messages("<image>w5", "w6")["messages"],
        messages("w5", "w6")["messages"][:1],
        messages("w5", "w6")["messages"],
    ]
    feature = datasets.Image() if column == "image" else datasets.List(datasets.Image())
    value = picture if column == "image" else [picture]
    data = datasets.Dataset.from_dict({"messages": rows, column: [value] * 3}).cast_column(column, feature)
    data.save_to_disk(str(tmp_path / "data"))
    table, report = load_samples(tmp_path / "data", collator, skip_broken=True)
    assert (report.good, [line.split(":")[0] for line in report.broken]) == (2, ["data[1]"])
    batch = collator([table[0], table[1]])
    assert batch["pixel_values"].shape[0] == 2
    assert table["length"][:] == batch["attention_mask"].sum(1).tolist()


def file_bytes(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["decoded", "undecoded", "undecoded list", "plain", "binary"])
def test_the_bytes_of_pictures(kind: str, tmp_path: Path, collator: AnswerCollator) -> None:
    """`datasets` keeps a picture without a file as its bytes; its grey of 16 bits is no white."""
    data = file_bytes(Image.fromarray(np.full((30, 40), 100 * 257, dtype=np.uint16)))
    undecoded = {"bytes": data, "path": None}
    column: list[Any] = [[undecoded] if kind == "undecoded list" else data if kind == "binary" else undecoded] * 2
    table = datasets.Dataset.from_dict({"messages": [messages("<image>w5", "w6")["messages"]] * 2, "image": column})
    if kind == "undecoded list":
        table = table.cast_column("image", datasets.List(datasets.Image(decode=False)))
    elif kind not in ("plain", "binary"):
        table = table.cast_column("image", datasets.Image(decode=kind == "decoded"))
    table.save_to_disk(str(tmp_path / "data"))
    found, report = load_samples(tmp_path / "data", collator)
    grey = Image.new("RGB", (40, 30), (100, 100, 100))
    expected = collator([vars(read_sample(messages("<image>w5", "w6", images=[grey])))] * 2)
    batch = collator([found[0], found[1]])
    assert report.good == 2
    assert all(bool((batch[name] == value).all()) for name, value in expected.items())
    assert found["length"][:] == batch["attention_mask"].sum(1).tolist()


def test_pictures_and_names_of_files(tmp_path: Path, collator: AnswerCollator) -> None:
    save_picture(tmp_path / "a.png")
    inside = {"bytes": file_bytes(Image.new("RGB", (40, 30))), "path": None}
    column = [inside, {"bytes": None, "path": str(tmp_path / "a.png")}]
    rows = {"messages": [messages("<image>w5", "w6")["messages"]] * 2, "image": column}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "data"))
    table, _ = load_samples(tmp_path / "data", collator)
    assert len(collator([table[0], table[1]])["pixel_values"]) == 2
    with pytest.raises(InputError, match="pictures and names of files; --images cannot be used with both"):
        load_samples(tmp_path / "data", collator, images=tmp_path)


def test_broken_images_of_any_kind_are_skipped(tmp_path: Path, collator: AnswerCollator) -> None:
    save_picture(tmp_path / "a.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.png").touch()
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "header.png").write_bytes(whole[:20])
    images = ["a.png", True, 3, [], "", "folder", "empty.png", "header.png", [["a.png"]], {"path": "a.png"}]
    records = [{**llava("<image>\nw5", "w6", image=None), "image": image} for image in images]
    path = tmp_path / "train.json"
    path.write_text(json.dumps([*records, llava("<video>\nw5", "w6", image=None)]))
    _, report = load_samples(path, collator, skip_broken=True)
    assert report.good == 2
    assert [line.split(":")[0] for line in report.broken] == [f"train.json[{n}]" for n in (1, 2, 3, 4, 5, 6, 7, 8, 10)]
    with pytest.raises(InputError, match=r"\[1\]: .*got True \(8 more are broken; --skip-broken leaves them out\)"):
        load_samples(path, collator)


def test_a_picture_that_breaks_in_the_middle_is_named(tmp_path: Path, collator: AnswerCollator) -> None:
    save_picture(tmp_path / "a.png", 200, 200)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BrokenSampleError, match=r"cannot read the picture .*a\.png: .*truncated"):
        collator([vars(read_sample(messages("<image>w5", "w6"), tmp_path))])


def test_a_text_that_the_processor_takes_for_an_image(collator: AnswerCollator) -> None:
    sample = read_sample(messages([text(collator.processor.image_token)], "w6", images=[]))
    with pytest.raises(BrokenSampleError, match="a text holds <image>, which stands for an image or a video"):
        collator.length(sample)


# --- The check ------------------------------------------------------------------------------------------------------


def test_the_check_decodes_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_picture(tmp_path / "a.png", 200, 40)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size(str(tmp_path / "a.png")) == (200, 40)


@pytest.mark.parametrize("behind", [False, True])
def test_the_exif_data_of_a_png(behind: bool, tmp_path: Path) -> None:
    """It may stand behind the pixels, where Pillow finds it when it has decoded them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    Image.new("RGB", (200, 40)).save(path, exif=exif)
    if behind:
        chunks = path.read_bytes()
        start = chunks.index(b"eXIf") - 4
        stop = start + 12 + int.from_bytes(chunks[start : start + 4], "big")
        end = chunks.index(b"IEND") - 4
        path.write_bytes(chunks[:start] + chunks[stop:end] + chunks[start:stop] + chunks[end:])
    assert image_size(str(path)) == open_picture(path).size == (40, 200)


def test_a_second_check_finds_what_the_first_one_kept(
    mixed: Path, collator: AnswerCollator, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, report = load_samples(mixed, collator, max_length=40, skip_broken=True)
    checked = []
    monkeypatch.setattr(dataset, "read_sample", lambda *given: checked.append(given) or read_sample(*given))
    again, same = load_samples(mixed, collator, max_length=40, skip_broken=True)
    assert (again[:], same) == (first[:], report)
    assert len(checked) == len(report.broken)  # these alone are looked at again
    load_samples(mixed, collator, max_length=41, skip_broken=True)
    assert len(checked) > 6


def test_a_sample_that_was_mended_is_good(mixed: Path, collator: AnswerCollator) -> None:
    load_samples(mixed, collator, skip_broken=True)
    save_picture(mixed.parent / "missing.png")
    table, report = load_samples(mixed, collator, skip_broken=True)
    assert (report.good, len(table), len(report.broken)) == (4, 4, 2)


def test_several_processes_check_many(
    tmp_path: Path, collator: AnswerCollator, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_picture(tmp_path / "a.png")
    path = tmp_path / "train.json"
    path.write_text(json.dumps([llava("<image>\nw5" + " w6" * (n % 7), "w6") for n in range(20)]))
    alone, _ = load_samples(path, collator)
    path.write_text(path.read_text() + " ")
    monkeypatch.setattr(dataset, "SAMPLES_A_PROCESS", 10)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    together, _ = load_samples(path, collator)
    assert together[:] == alone[:]
    assert len(list((tmp_path / "cache" / "pyramiddrop").glob("*_of_00002.arrow"))) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "cannot read"), ('{"a": 1}', "must be a list"), ("[]", "holds no sample"), (None, "no such file")],
)
def test_a_file_that_holds_no_samples(
    content: str | None, reason: str, tmp_path: Path, collator: AnswerCollator
) -> None:
    path = tmp_path / "train.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=reason):
        load_samples(path, collator)
