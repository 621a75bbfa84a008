"""Run by test_second_runner.py in a process of its own: mixed requests through vLLM's second model runner."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from served import answers, blocks_in_use, engine, expected, questions, scheduler

from pyramiddrop import PyramidDrop

METHOD = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125])
ASKED = questions(8, tokens=(4, 10))
TIGHT = {"max_num_batched_tokens": 24, "max_model_len": 192, "num_gpu_blocks_override": 25}


def main(folder: Path) -> None:
    """Exit with an AssertionError where an answer is wrong."""
    wanted = expected(folder, ASKED, METHOD)
    options: dict[str, Any]
    for options in ({}, TIGHT):
        with engine(folder, METHOD, **options) as llm:
            runner = llm.llm_engine.model_executor.driver_worker.model_runner
            assert type(runner.model_state).__name__ == "StagedModelState", "this is not the second runner"
            assert answers(llm, ASKED, every=0 if options else 2) == wanted
            assert blocks_in_use(scheduler(llm)) == 0
            assert not runner.get_model().pyramiddrop_batch.waiting


if __name__ == "__main__":
    main(Path(sys.argv[1]))
