"""The prefix cache under dropping: the answers of an engine without one, and hits where there can be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")

from qwen import masked_answers, with_pictures
from repeated import BLOCK, about, ask, words
from served import Question, blocks_in_use, engine, expected, sampling, scheduler

from pyramiddrop import FastV, Method, PyramidDrop, RandomDrop
from pyramiddrop.vllm.prefix_rows import PrefixRows
from qwen_checkpoints import save_qwen
from reference import Rule

RULE = Rule([2, 4, 6], [0.5, 0.25, 0.125])
HALVES = PyramidDrop(layers=RULE.layers, keep=RULE.keep)
OFF = {"pyramiddrop": "off"}


@pytest.fixture(scope="module")
def cached(llava: Path) -> Iterator[Any]:
    with engine(llava, HALVES) as llm:
        yield llm


@pytest.fixture
def fresh(cached: Any) -> Any:
    """With nothing in its cache."""
    assert cached.reset_prefix_cache()
    return cached


def test_prompts_without_pictures_are_cached_whole(fresh: Any, llava: Path) -> None:
    asked = [Question(words(70, 5), (), 6), Question(f"{words(70, 5)} {words(30, 40)}", (), 6)]
    found, hits = ask(fresh, [*asked, *asked])
    assert found == expected(llava, asked, None) * 2
    assert hits == [0, 2 * BLOCK, 2 * BLOCK, 3 * BLOCK]


def test_a_new_question_about_the_same_pictures(fresh: Any, llava: Path) -> None:
    """The first stage is exact for any question: its blocks are used again, up to one that ends amid a picture."""
    asked = [about([1, 2, 3], question) for question in range(4)]
    wanted = expected(llava, asked, HALVES)
    assert len({tuple(one) for one in wanted}) > 1, "the questions must matter"
    found, hits = ask(fresh, asked)
    assert found == wanted
    assert hits == [0, *[2 * BLOCK] * 3]


def test_a_further_turn(fresh: Any, llava: Path) -> None:
    """The prompt of a chat's second turn begins with that of its first."""
    first = about([1, 2, 3], 0, after=40)
    second = Question(f"{first.prompt} {words(30, 20)}", first.images, 6)
    found, hits = ask(fresh, [first, second])
    assert found == expected(llava, [first, second], HALVES)
    assert hits == [0, 3 * BLOCK]


def test_text_before_the_first_picture(fresh: Any, llava: Path) -> None:
    asked = [about([number], number, before=70) for number in range(3)]
    found, hits = ask(fresh, asked)
    assert found == expected(llava, asked, HALVES)
    assert hits == [0, *[2 * BLOCK] * 2]


def test_another_picture_is_no_hit(fresh: Any, llava: Path) -> None:
    asked = [about([1, 2, 3], 0), about([4, 2, 3], 0)]
    found, hits = ask(fresh, asked)
    assert found == expected(llava, asked, HALVES)
    assert hits == [0, 0]


@pytest.mark.parametrize("length", [65, 66, 67])
def test_no_single_token_of_a_prompt_is_left_over(fresh: Any, llava: Path, length: int) -> None:
    """It would be replayed as a step of decoding: a block less is used."""
    asked = [about([1, 2], 0, before=length - 34, after=1)] * 3
    found, hits = ask(fresh, asked)
    assert found == expected(llava, asked, HALVES)
    assert hits == [0, *[BLOCK if length == 65 else 2 * BLOCK] * 2]


def test_what_drops_and_what_does_not_never_share(fresh: Any, llava: Path) -> None:
    asked = [about([1, 2, 3], question) for question in range(2)]
    dropped, vanilla = expected(llava, asked, HALVES), expected(llava, asked, None)
    assert dropped != vanilla
    found, hits = ask(fresh, asked, OFF)
    assert (found, hits) == (vanilla, [0, 2 * BLOCK])
    found, hits = ask(fresh, asked)
    assert (found, hits[0]) == (dropped, 0)
    assert ask(fresh, asked, OFF)[0] == vanilla


def test_requests_of_one_step(fresh: Any, llava: Path) -> None:
    """Rows of a block are there from the next step on: all at once is no reason for a wrong answer."""
    asked = [about([1, 2, 3], question % 5) for question in range(12)]
    outputs = fresh.generate([one.inputs for one in asked], sampling(6), use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected(llava, asked, HALVES)
    assert sum(output.num_cached_tokens for output in outputs) > 0
    assert blocks_in_use(scheduler(fresh)) == 0


def test_control_rows_of_another_prompt(fresh: Any, llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [about([1, 2, 3], question) for question in range(4)]
    read = PrefixRows.read
    monkeypatch.setattr(PrefixRows, "read", lambda self, table, *place: read(self, table * 0, *place))
    assert ask(fresh, asked)[0] != expected(llava, asked, HALVES)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param(FastV(layer=3, keep=0.4), {"max_num_batched_tokens": 40}, id="the layer before ranks, in parts"),
        pytest.param(
            PyramidDrop(lam=0.4, per_image=True), {"max_num_batched_tokens": 24}, id="few blocks are remembered"
        ),
        pytest.param(PyramidDrop(layers=[4, 6], keep=[0.5, 0.25]), {}, id="two groups of the first stage"),
        pytest.param(RandomDrop(lam=0.5, seed=3), {}, id="random", marks=pytest.mark.slow),
        pytest.param(PyramidDrop(lam=0.4, score="diversity"), {}, id="diversity", marks=pytest.mark.slow),
        pytest.param(
            HALVES, {"max_model_len": 192, "num_gpu_blocks_override": 26}, id="few blocks", marks=pytest.mark.slow
        ),
    ],
)
def test_methods(llava: Path, method: Method, options: dict[str, Any]) -> None:
    asked = [about([group, group + 1, group + 2], question) for question in range(3) for group in range(3)]
    wanted = expected(llava, asked, method)
    with engine(llava, method, **options) as llm:
        assert ask(llm, asked)[0] == wanted
        found, hits = ask(llm, [one for one in asked for _ in range(2)])
        outputs = llm.generate([one.inputs for one in asked], sampling(6), use_tqdm=False)
    assert found == [one for one in wanted for _ in range(2)]
    assert sum(hits) > 0
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted


def test_positions_of_three_axes(tmp_path: Path) -> None:
    folder = save_qwen(tmp_path, "qwen2_5_vl")
    asked = [with_pictures(about([1, 2, 3], question, before=50)) for question in range(4)]
    with engine(folder, HALVES) as llm:
        found, hits = ask(llm, asked)
    assert found == masked_answers(folder, asked, RULE)
    assert hits[1:] == [2 * BLOCK] * 3
