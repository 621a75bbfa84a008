"""What is answered already: replies come back from the disk as they were, up to the last whole batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pyramiddrop.evaluation.answering import Place, Reply
from pyramiddrop.evaluation.samples import PictureFiles, Sample
from pyramiddrop.evaluation.store import ReplyJournal, digest, model_digest, samples_digest
from pyramiddrop.inference import InputError
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint
from pyramiddrop.inference.prefill_stats import StageTokens, Usage

KEY = {"model": "m", "method": {"lam": 0.5}}


def reply(text: str) -> Reply:
    stages = (StageTokens(2, 0.5, 8),)
    return Reply(text, Usage(16, 5, stages, 10, 20), Usage(16, 5, (), 30, 40), Place(0.25, 0.5) if text else None)


REPLIES = [reply(text) for text in ("a", "b\nc", "ü", "", "e")]


def written(folder: Path) -> ReplyJournal:
    journal = ReplyJournal(folder, "x", KEY)
    assert journal.read(2, 5) == []
    for start in range(0, 5, 2):
        journal.append_replies(REPLIES[start : start + 2])
    return journal


def test_replies_come_back_as_they_were(tmp_path: Path) -> None:
    written(tmp_path)
    assert ReplyJournal(tmp_path, "x", KEY).read(2, 5) == REPLIES


def test_a_cost_that_is_not_known_comes_back(tmp_path: Path) -> None:
    journal = ReplyJournal(tmp_path, "x", KEY)
    journal.read(1, 1)
    journal.append_replies([Reply("a", Usage(16, 5, (), math.nan, math.nan), Usage(16, 5, (), math.nan, math.nan))])
    (found,) = journal.read(1, 1)
    assert math.isnan(found.usage.flops)
    assert math.isnan(found.vanilla.kv_bytes)


@pytest.mark.parametrize("lost", [1, 2, 30, 90])
def test_a_line_that_was_cut_off_takes_its_batch_along(tmp_path: Path, lost: int) -> None:
    path = written(tmp_path).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    journal = ReplyJournal(tmp_path, "x", KEY)
    assert journal.read(2, 5) == REPLIES[:4]
    journal.append_replies(REPLIES[4:])
    assert path.read_bytes() == whole
    assert journal.read(2, 5) == REPLIES


def test_a_broken_line_takes_its_batch_and_all_that_follow_along(tmp_path: Path) -> None:
    path = written(tmp_path).path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b"{}\n", *lines[5:]]))  # the second reply of the second batch
    assert ReplyJournal(tmp_path, "x", KEY).read(2, 5) == REPLIES[:2]


@pytest.mark.parametrize("key", [{**KEY, "model": "n"}, {**KEY, "method": {"lam": 0.6}}])
def test_another_key_is_another_file(tmp_path: Path, key: dict[str, Any]) -> None:
    written(tmp_path)
    assert ReplyJournal(tmp_path, "x", key).read(2, 5) == []
    assert ReplyJournal(tmp_path, "x", KEY).read(2, 5) == REPLIES


def test_a_file_without_its_head_is_begun_anew(tmp_path: Path) -> None:
    path = written(tmp_path).path
    path.write_bytes(path.read_bytes()[1:])
    assert ReplyJournal(tmp_path, "x", KEY).read(2, 5) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        ReplyJournal(tmp_path / "file", "x", KEY).read(2, 5)


# Fingerprints


def test_parts_do_not_run_together() -> None:
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    assert digest(["ab"]) == digest([b"ab"])


def test_of_samples_questions_pictures_and_order_count(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    one, two = Sample((red,), "Why?", ("a",)), Sample((blue,), "How?", ("b",))
    found = samples_digest([one, two])
    assert found == samples_digest([Sample((red,), "Why?", ("other",), kind="k"), two])
    others = ([two, one], [one], [Sample((blue,), "Why?"), two], [Sample((red,), "Who?"), two])
    assert found not in {samples_digest(other) for other in others}
    for name, picture in (("a.png", red), ("b.png", blue)):
        picture.save(tmp_path / name)
    files = [samples_digest([Sample(PictureFiles([tmp_path / name]), "Why?")]) for name in ("a.png", "b.png")]
    assert files[0] != files[1]


def test_of_a_model_a_changed_weight_counts_and_its_place_does_not(llava_folder: Path) -> None:
    checkpoint = load_checkpoint(llava_folder, "cpu")
    found = model_digest(checkpoint)
    assert model_digest(Checkpoint(checkpoint.model, checkpoint.processor, "elsewhere")) == found
    assert model_digest(load_checkpoint(llava_folder, "cpu", "bfloat16")) != found
    weight = checkpoint.model.get_input_embeddings().weight
    with torch.no_grad():
        weight *= 1.001
    assert model_digest(checkpoint) != found
