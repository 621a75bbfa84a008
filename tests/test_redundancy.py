"""The redundancy study: each statistic against hand-made numbers, each cell against answering plainly, resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.evaluation.answering import Answerer
from pyramiddrop.evaluation.prefill_replay import PrefillReplay
from pyramiddrop.evaluation.samples import Sample
from pyramiddrop.evaluation.store import Journal
from pyramiddrop.evaluation.studies.attention import (
    attention_by_layer,
    attention_concentration,
    attention_on_picture,
    pick_samples,
    single_drop,
    spread_layers,
)
from pyramiddrop.evaluation.studies.redundancy import (
    Grid,
    Means,
    Redundancy,
    kl_divergence_to,
    make_grid,
    profile_of,
    ratio,
    top1_match,
    usual_layers,
)
from pyramiddrop.evaluation.tasks import Task, digits_task
from pyramiddrop.hf import inspect_model
from pyramiddrop.inference import InputError
from pyramiddrop.inference.checkpoint import Checkpoint, load_checkpoint
from pyramiddrop.planning import Profile
from tiny import make_batch, tiny_model

GRID = Grid((2, 6), (1.0, 0.5, 1 / 64))
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@cache
def bundled() -> Checkpoint:
    return load_checkpoint(digits_checkpoint(), "cpu")


@cache
def task() -> Task:
    return digits_task(limit=32)


def samples() -> Sequence[Sample]:
    return task().samples


def study(grid: Grid = GRID, asked: Task | None = None, batch: int = 16, share: bool = True) -> Redundancy:
    return Redundancy("digits", "bundled", Answerer(bundled(), batch), asked or task(), grid, share)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The study of two scenes."""
    return study().run(tmp_path_factory.mktemp("study"))


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_divergence_is_that_of_the_definition() -> None:
    full, dropped = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log(), torch.tensor([[0.25, 0.75], [0.2, 0.8]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    found = kl_divergence_to(full + 3.0, dropped - 1.0)  # a constant beside logits means nothing
    assert found.tolist() == pytest.approx([expected, 0.0], abs=1e-7)
    assert kl_divergence_to(dropped, full)[0] != pytest.approx(expected)
    assert kl_divergence_to(full, full).tolist() == [0.0, 0.0]


def test_a_token_that_is_impossible_in_the_full_model_does_not_count() -> None:
    full, dropped = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]])
    assert kl_divergence_to(full, dropped).tolist() == pytest.approx([math.log(2)])


def test_same_choice_is_that_of_the_likeliest_token() -> None:
    one, other = torch.tensor([[1.0, 2, 3], [3, 2, 1]]), torch.tensor([[0.0, 0, 9], [1, 2, 1]])
    assert top1_match(one, other).tolist() == [True, False]


def test_attention_on_the_picture_and_how_few_tokens_get_it() -> None:
    scores = torch.tensor([0.05, 0.3, 0.0, 0.15])
    assert attention_on_picture(scores) == pytest.approx(0.5)
    assert attention_concentration(scores) == 0.5  # 0.3 + 0.15 are nine tenths of 0.5
    assert attention_concentration(torch.tensor([1.0, 0, 0, 0])) == 0.25
    assert attention_concentration(torch.full((10,), 0.1)) == pytest.approx(0.9)


def test_means_are_clustered_and_leave_out_what_is_unknown() -> None:
    asked = [Sample((), "", kind=kind, cluster=cluster) for kind, cluster in ("aA", "bA", "aB", "bC")]
    found = Means(asked)
    assert found.score([1.0, 0.0, None, 0.5]) == {"mean": 0.5, "error": 0.0, "count": 3}
    assert found.score([None] * 4) is None
    # Of b alone, 0 and 0.5 of two clusters: residuals -0.25 and 0.25, sqrt(2 / 1 * 0.125) / 2.
    assert found.by_kind([1.0, 0.0, None, 0.5])["b"] == {"mean": 0.25, "error": pytest.approx(0.25), "count": 2}
    assert found.by_kind([1.0, 0.0, None, 0.5])["a"] == {"mean": 1.0, "error": None, "count": 1}
    assert found.by_kind([1.0, None, 1.0, None]) == {}


def test_samples_without_a_cluster_are_independent() -> None:
    error = Means([Sample((), "")] * 4).score([1.0, 0.0, 1.0, 0.0])
    assert error is not None
    assert error["error"] == pytest.approx((4 / 3) ** 0.5 * 0.5 / 4**0.5)


def test_ratio_is_of_sums() -> None:
    assert ratio([1.0, 2.0], [2.0, 8.0]) == 0.3
    assert ratio([1.0, None], [2.0, 8.0]) is None


# ---- what is tried -------------------------------------------------------------------------------------------------


def test_usual_layers() -> None:
    assert usual_layers(32, range(1, 32)) == (2, 4, 8, 12, 16, 20, 24, 28)
    assert usual_layers(8, range(1, 8)) == (1, 2, 3, 4, 5, 6, 7)
    assert usual_layers(32, range(5, 30, 6)) == (5, 11, 17, 23, 29)  # none of the wanted ones is allowed
    assert usual_layers(32, range(4, 32, 4)) == (4, 8, 12, 16, 20, 24, 28)


@pytest.mark.parametrize(
    ("layers", "keep", "message"),
    [
        ([0], None, "layer"),
        ([8], None, "8 layers"),
        (None, [0.0], "keep"),
        (None, [1.5], "keep"),
        ([], None, "at least one layer"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(layers: Any, keep: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_grid(inspect_model(bundled().model), layers, keep)


def test_glances_are_of_other_pictures_and_kinds() -> None:
    picked = pick_samples(samples(), 3)
    assert len({one.kind for one in picked}) == 3
    assert len({one.cluster for one in picked}) == 3
    assert len(pick_samples(samples(), 1000)) == 32
    assert spread_layers([1, 2, 3, 4, 5, 6, 7]) == [1, 3, 5, 7]
    assert spread_layers([2, 8]) == [2, 8]


# ---- cells ---------------------------------------------------------------------------------------------------------


def test_the_shared_prefix_changes_nothing(record: dict[str, Any], tmp_path: Path) -> None:
    plain = study(share=False).run(tmp_path)
    assert record["shared_prefix"]
    assert plain == {**record, "shared_prefix": False}


def test_a_model_that_cannot_share_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid((6,), (0.5,))
    plain = study(grid, share=False).run(tmp_path / "plain")
    replay = PrefillReplay._replay
    monkeypatch.setattr(PrefillReplay, "_replay", lambda *args, **kwargs: replay(*args, **kwargs) * 1.5)
    found = study(grid).run(tmp_path / "tried")
    assert not found["shared_prefix"]
    assert found == plain


def test_every_cell_is_what_answering_under_its_method_gives(record: dict[str, Any]) -> None:
    answerer = Answerer(bundled(), batch=7)
    full = answerer.answers(samples())
    for cell in record["cells"]:
        replies = answerer.answers(samples(), single_drop(cell["layer"], cell["keep"]))
        right = [reply.text in one.answers for reply, one in zip(replies, samples(), strict=True)]
        same = [reply.text == whole.text for reply, whole in zip(replies, full, strict=True)]
        assert cell["accuracy"]["mean"] == pytest.approx(sum(right) / 32)
        assert cell["agreement"]["mean"] == pytest.approx(sum(same) / 32)
        flops = sum(one.usage.flops for one in replies) / sum(one.vanilla.flops for one in replies)
        assert cell["flops_ratio"] == pytest.approx(flops)
    assert min(cell["accuracy"]["mean"] for cell in record["cells"]) < record["vanilla"]["accuracy"]["mean"]
    assert record["visual_tokens"] == 64


def test_next_token_scores_are_those_of_plain_forwards(record: dict[str, Any]) -> None:
    from pyramiddrop.inference.prompt import build_batch

    inputs = build_batch(bundled().processor, [(list(one.images), one.question) for one in samples()])
    with torch.no_grad():
        full = bundled().model(**inputs).logits[:, -1].double().log_softmax(-1)
        for cell in record["cells"]:
            with single_drop(cell["layer"], cell["keep"])(bundled().model):
                dropped = bundled().model(**inputs).logits[:, -1].double().log_softmax(-1)
            expected = (full.exp() * (full - dropped)).sum(-1).mean()
            assert cell["kl"]["mean"] == pytest.approx(float(expected), rel=1e-3, abs=1e-9)
            assert cell["top1"]["mean"] == (full.argmax(-1) == dropped.argmax(-1)).double().mean()


def test_keeping_all_is_the_full_model_exactly(record: dict[str, Any]) -> None:
    for cell in record["cells"]:
        if cell["keep"] == 1:
            assert (cell["kl"]["mean"], cell["kl"]["error"]) == (0, 0)
            assert cell["top1"]["mean"] == cell["agreement"]["mean"] == cell["flops_ratio"] == 1
            assert cell["accuracy"] == record["vanilla"]["accuracy"]
            assert cell["by_kind"] == record["vanilla"]["by_kind"]


def test_without_answers_there_is_no_accuracy(tmp_path: Path) -> None:
    silent = [Sample(one.images, one.question) for one in samples()[:4]]
    found = study(Grid((2,), (0.5,)), Task("mine", {}, silent, "exact", ("all",))).run(tmp_path)
    assert found["vanilla"] == {"accuracy": None, "by_kind": {}}
    assert found["cells"][0]["accuracy"] is None
    assert found["cells"][0]["agreement"]["count"] == 4
    assert Profile.from_dict(profile_of(found)).losses[2, 0.5] == 1 - found["cells"][0]["agreement"]["mean"]


def test_attention_is_that_of_eager_attention() -> None:
    model = tiny_model(attention="eager", layers=4)
    inputs = make_batch(model, [[5, "image", 7], [3, "image", 2]])
    with torch.no_grad():
        whole = model(**inputs, output_attentions=True).attentions
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found = attention_by_layer(model, inputs, [1, 3])
        for layer, scores in found.items():
            for row, (ids, one) in enumerate(zip(inputs["input_ids"], scores, strict=True)):
                expected = whole[layer][row, :, -1].mean(0)[ids == 199]
                torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_it_agrees_with_what_docs_digits_md_has(tmp_path: Path) -> None:
    known = json.loads((RESULTS / "digits-grid.json").read_text())["methods"]
    task = digits_task()
    task = replace(task, samples=task.samples[:640])  # the record is of the first pictures, all of their questions
    found = study(make_grid(inspect_model(bundled().model)), task, batch=64).run(tmp_path)
    assert found["vanilla"]["accuracy"] == pytest.approx(known["vanilla"]["scores"]["all"])
    assert len(found["cells"]) == 28
    for cell in found["cells"]:
        entry = known[f"{cell['layer']}/{cell['keep']:g}"]
        assert cell["accuracy"] == pytest.approx(entry["scores"]["all"])
        assert cell["by_kind"] == {kind: pytest.approx(entry["scores"][kind]) for kind in cell["by_kind"]}
        assert cell["flops_ratio"] == pytest.approx(entry["flops_ratio"], abs=1e-2)


# ---- resuming ------------------------------------------------------------------------------------------------------


def killer(after: int) -> Callable[[int], None]:
    """Stops a study after so many steps."""
    left = [after]

    def advance(steps: int) -> None:
        left[0] -= steps
        if left[0] < 0:
            raise KeyboardInterrupt

    return advance


@pytest.mark.slow
def test_a_killed_study_goes_on(record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    per_batch = 1 + len(GRID.cells)
    assert study().steps == 2 * per_batch
    with pytest.raises(KeyboardInterrupt):
        study().run(tmp_path, killer(per_batch + 2))
    measured = []
    whole = Redundancy._measure
    monkeypatch.setattr(Redundancy, "_measure", lambda self, *args: measured.append(1) or whole(self, *args))
    steps: list[int] = []
    assert study().run(tmp_path, steps.append) == record
    assert (len(measured), sum(steps)) == (1, 2 * per_batch)


def test_another_grid_or_other_questions_are_measured_anew(tmp_path: Path) -> None:
    study(Grid((6,), (0.5,))).run(tmp_path)
    found = study(Grid((2,), (0.5,))).run(tmp_path)
    assert [cell["layer"] for cell in found["cells"]] == [2]
    other = study(Grid((2,), (0.5,)), digits_task(seed=1, limit=16)).run(tmp_path)
    assert other["samples"] == 16
    assert len(list(tmp_path.iterdir())) == 3


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    first = Journal(tmp_path, "test", {"batch": 1})
    assert not first.path.exists()
    first.keep([])
    first.append([{"a": [1]}])
    first.append([{"b": [2]}])
    assert Journal(tmp_path, "test", {"batch": 1}).entries() == [{"a": [1]}, {"b": [2]}]
    assert Journal(tmp_path, "test", {"batch": 2}).entries() == []
    first.path.write_text(first.path.read_text()[:-5])
    again = Journal(tmp_path, "test", {"batch": 1})
    assert again.entries() == [{"a": [1]}]
    again.keep([{"a": [1]}])
    again.append([{"b": [3]}])
    assert Journal(tmp_path, "test", {"batch": 1}).entries() == [{"a": [1]}, {"b": [3]}]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = Journal(tmp_path, "test", {}).path
    path.mkdir()
    with pytest.raises(InputError, match=f"cannot read {path}"):
        Journal(tmp_path, "test", {}).entries()


# ---- the profile ---------------------------------------------------------------------------------------------------


def test_the_profile_has_the_losses_of_the_study(record: dict[str, Any]) -> None:
    profile = Profile.from_dict(json.loads(json.dumps(profile_of(record))))
    assert (profile.num_layers, profile.layers, profile.keep) == (8, (2, 6), (1.0, 0.5, 1 / 64))
    vanilla = record["vanilla"]["accuracy"]["mean"]
    cells = {(cell["layer"], cell["keep"]): cell["accuracy"]["mean"] for cell in record["cells"]}
    assert profile.losses[2, 0.5] == pytest.approx(max(0, vanilla - cells[2, 0.5]))
    assert profile.losses[2, 1 / 64] == pytest.approx(max(profile.losses[2, 0.5], vanilla - cells[2, 1 / 64]))
