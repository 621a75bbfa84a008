"""InternVL, whose pictures are tiles, in both of its formats: the tokens of the `hf` adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")

from PIL import Image
from served import Question, answers, blocks_in_use, engine, expected, films, questions, scheduler

from internvl_checkpoints import FILM, MOST_TILES, PICTURE, TILE, save_internvl, save_internvl_chat
from pyramiddrop import Method, PyramidDrop

HALVES = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125])
CHAT = questions(8, seed=5, tokens=(6, 16))  # `<image>` stands for a picture
ASKED = [Question(question.prompt.replace("<image>", PICTURE), question.images, question.tokens) for question in CHAT]
FEW_BLOCKS = {"max_num_batched_tokens": 64, "max_model_len": 256, "num_gpu_blocks_override": 34}


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("internvl-qwen2", HALVES, {}),
        ("internvl-qwen2", PyramidDrop(lam=0.4, per_image=True), FEW_BLOCKS),
        ("internvl-qwen3", HALVES, FEW_BLOCKS),
    ],
    ids=["Qwen2", "each picture its quota, in parts", "Qwen3, in parts"],
)
def test_internvl(tmp_path: Path, family: str, method: Method, options: dict[str, Any]) -> None:
    folder = save_internvl(tmp_path, family)
    wanted = expected(folder, ASKED, method)
    assert sum(one != other for one, other in zip(wanted, expected(folder, ASKED, None), strict=True)) >= 4
    with engine(folder, method, **options) as llm:
        assert answers(llm, ASKED, every=2) == wanted
        assert answers(llm, ASKED[::-1]) == wanted[::-1]
        assert blocks_in_use(scheduler(llm)) == 0


def test_videos(tmp_path: Path) -> None:
    """Frames with their numbers between them; they share one quota with the tiles of the picture before."""
    folder, asked = save_internvl(tmp_path), films(3, PICTURE, FILM)
    wanted = expected(folder, asked, HALVES)
    assert wanted != expected(folder, asked, None)
    options = {"limit_mm_per_prompt": {"image": 1, "video": 1}, "max_num_batched_tokens": 40}
    with engine(folder, HALVES, **options) as llm:
        assert answers(llm, asked) == wanted


def cut_by_vllm(pictures: list[Image.Image]) -> torch.Tensor:
    """The tiles of a checkpoint in the authors' format; Transformers' differ by how they are resized."""
    from vllm.transformers_utils.processors.internvl import image_to_pixel_values_internvl

    sizes = {"input_size": TILE, "min_num": 1, "max_num": MOST_TILES, "use_thumbnail": True}
    return torch.cat([image_to_pixel_values_internvl(one, **sizes) for one in pictures])


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("family", ["internvl-qwen2", "internvl-qwen3"])
def test_internvl_in_the_authors_format(tmp_path: Path, family: str) -> None:
    """The same weights by other names: Transformers reads one folder, vLLM the other."""
    folder = save_internvl(tmp_path / "transformers", family)
    chat = save_internvl_chat(tmp_path / "authors", family)
    for method, options in ((None, {}), (PyramidDrop(lam=1.0), {}), (HALVES, FEW_BLOCKS)):
        with engine(chat, method, trust_remote_code=True, **options) as llm:
            assert answers(llm, CHAT, every=2) == expected(folder, ASKED, method, cut_by_vllm)


@pytest.mark.slow
def test_keep_all_is_plain_vllm(tmp_path: Path) -> None:
    folder = save_internvl(tmp_path)
    found = []
    for method in (None, PyramidDrop(lam=1.0)):
        with engine(folder, method) as llm:
            found.append(answers(llm, ASKED, every=2))
    assert found[0] == found[1] == expected(folder, ASKED, None)


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    folder = save_internvl(tmp_path, "internvl-qwen3-moe")
    wanted = expected(folder, ASKED, HALVES)
    assert wanted != expected(folder, ASKED, None)
    with engine(folder, HALVES, **FEW_BLOCKS) as llm:
        assert answers(llm, ASKED, every=2) == wanted
