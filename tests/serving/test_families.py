"""The families beyond LLaVA, against the masked reference: full length, dropped tokens masked, no adapter in it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")

from qwen import masked_answers, with_pictures
from served import answers, engine, films, questions

from pyramiddrop import PyramidDrop
from qwen_checkpoints import FAMILIES, FILM, PICTURE, save_qwen
from reference import Rule

RULE = Rule([2, 4, 6], [0.5, 0.25, 0.125])
METHOD = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125])
ASKED = [with_pictures(question) for question in questions(8, seed=5, tokens=(6, 16))]


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_qwen_vl(family: str, tmp_path: Path) -> None:
    folder = save_qwen(tmp_path, family)
    wanted = masked_answers(folder, ASKED, RULE)
    with engine(folder, METHOD, max_num_batched_tokens=64) as llm:
        assert answers(llm, ASKED, every=2) == wanted


FILM_ENGINE = {"limit_mm_per_prompt": {"image": 1, "video": 1}}


def test_videos(tmp_path: Path) -> None:
    """All visual tokens of a prompt share one quota, those of its video and of its picture."""
    folder, asked = save_qwen(tmp_path, "qwen2_5_vl"), films(3, PICTURE, FILM)
    wanted = masked_answers(folder, asked, RULE)
    with engine(folder, METHOD, max_num_batched_tokens=24, **FILM_ENGINE) as llm:
        assert answers(llm, asked) == wanted


@pytest.mark.slow
def test_videos_whose_frames_stand_apart(tmp_path: Path) -> None:
    """Qwen3-VL's, with timestamps between them. On this tiny checkpoint plain vLLM and Transformers differ, dropping or
    not: so vLLM is held against itself."""
    folder, asked = save_qwen(tmp_path, "qwen3_vl"), films(3, PICTURE, FILM)
    found = {}
    for name, method, options in (
        ("plain", None, {}),
        ("all", PyramidDrop(lam=1.0), {}),
        ("whole", METHOD, {}),
        ("parts", METHOD, {"max_num_batched_tokens": 24}),
    ):
        with engine(folder, method, **FILM_ENGINE, **options) as llm:
            found[name] = answers(llm, asked)
    assert found["all"] == found["plain"]
    assert found["parts"] == found["whole"]
    assert found["whole"] != found["all"]


def test_qwen3_vl_drops_nothing_where_it_still_adds(tmp_path: Path) -> None:
    folder = save_qwen(tmp_path, "qwen3_vl")
    with (
        pytest.raises(ValueError, match="adds visual features after its first 2 layers"),
        engine(folder, PyramidDrop(layers=[1], keep=[0.5])),
    ):
        pass
