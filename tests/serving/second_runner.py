"""Run by test_second_runner.py in a process of its own: mixed requests through vLLM's second model runner.

Arguments: the family, the checkpoint of LLaVA, and an empty folder for those of other families.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen import masked_answers, with_pictures
from repeated import BLOCK, about, ask
from served import Question, answers, blocks_in_use, engine, expected, films, questions, scheduler
from test_lora import LORA, mixed, request, save_adapters, turns
from vllm.model_executor.models import registry

import internvl_checkpoints
import qwen_checkpoints
from pyramiddrop import PyramidDrop
from reference import Rule

RULE = Rule([2, 4, 6], [0.5, 0.25, 0.125])
METHOD = PyramidDrop(layers=RULE.layers, keep=RULE.keep)
ASKED = questions(8, tokens=(4, 10))
TIGHT = {"max_num_batched_tokens": 24, "max_model_len": 192, "num_gpu_blocks_override": 25}
PARTS = {"max_num_batched_tokens": 64, "limit_mm_per_prompt": {"image": 3, "video": 1}}


def check(
    folder: Path,
    asked: Sequence[Question],
    wanted: list[list[int]],
    every: int,
    options: dict[str, Any],
    repeated: Sequence[Question] = (),
) -> None:
    """AssertionError if an answer is wrong or something is left over.

    Args:
        folder: of the checkpoint.
        asked: requests.
        wanted: their answers.
        every: steps between two of them; 0 sends all at once.
        options: of the engine.
        repeated: prompts that begin alike, asked afterwards: of each but the first the prefix cache knows two blocks.
    """
    with engine(folder, METHOD, **options) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.model_runner
        assert type(runner.model_state).__name__ == "StagedModelState", "this is not the second runner"
        assert answers(llm, asked, every) == wanted, f"{folder}, {options}"
        if repeated:
            assert ask(llm, repeated) == (expected(folder, repeated, METHOD), [0, *[2 * BLOCK] * (len(repeated) - 1)])
        assert blocks_in_use(scheduler(llm)) == 0
        assert not runner.get_model().pyramiddrop_batch.waiting


def llava(folder: Path, scratch: Path) -> None:
    """All at once, in parts with few blocks, one question about the same pictures after another, and with adapters."""
    wanted = expected(folder, ASKED, METHOD)
    check(folder, ASKED, wanted, 2, {}, [about([1, 2, 3], question) for question in range(3)])
    check(folder, [*ASKED, *ASKED], [*wanted, *wanted], 0, TIGHT)
    merged = save_adapters(folder, scratch)
    adapters = [request(scratch, name) for name in turns(len(ASKED))]
    with engine(folder, METHOD, **LORA, max_num_batched_tokens=40) as llm:
        assert answers(llm, ASKED, 2, adapters=adapters) == mixed(merged, ASKED, METHOD)


def internvl(_: Path, scratch: Path) -> None:
    """Tiles and a video."""
    picture, film = internvl_checkpoints.PICTURE, internvl_checkpoints.FILM
    folder = internvl_checkpoints.save_internvl(scratch)
    asked = [Question(one.prompt.replace("<image>", picture), one.images, one.tokens) for one in ASKED]
    asked += films(1, picture, film)
    check(folder, asked, expected(folder, asked, METHOD), 2, PARTS)


def qwen(_: Path, scratch: Path) -> None:
    """Qwen's families, whose positions have three axes."""
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        folder = qwen_checkpoints.save_qwen(scratch / family, family)
        asked = [with_pictures(one) for one in ASKED]
        if family != "qwen3_vl":  # there plain vLLM and Transformers differ
            asked += films(1, qwen_checkpoints.PICTURE, qwen_checkpoints.FILM)
        check(folder, asked, masked_answers(folder, asked, RULE), 2, PARTS)


if __name__ == "__main__":
    registry._run_in_subprocess = lambda inspect: inspect()  # as conftest.py has it
    {"llava": llava, "internvl": internvl, "qwen": qwen}[sys.argv[1]](*map(Path, sys.argv[2:]))
