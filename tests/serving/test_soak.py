"""A long run of mixed requests, some of which are cancelled at any moment: nothing wrong, and nothing left."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")

from repeated import BLOCK, about
from served import answers, blocks_in_use, engine, expected, questions, sampling, scheduler

from pyramiddrop import PyramidDrop

REQUESTS, CANCELLED = 200, 0.3


def test_what_is_held_does_not_grow_with_requests(llava: Path) -> None:
    """Rows at the first drop are kept for the tokens of four budgets, and nothing else outlives a request."""
    budget = 2 * BLOCK
    with engine(llava, PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125]), max_num_batched_tokens=budget) as llm:
        of = scheduler(llm)
        batch = llm.llm_engine.model_executor.driver_worker.model_runner.get_model().pyramiddrop_batch
        sizes = []
        for group in range(3):
            answers(llm, [replace(about([3 * number], 0, 30), tokens=2) for number in range(8 * group, 8 * group + 8)])
            sizes.append(len(of._recorded._known))
            assert not of.dropped
            assert not batch.waiting
            assert len(batch.prefix._hidden) == len(batch.prefix._positions) == 4 * budget
    assert sizes == [4 * budget // BLOCK] * 3, "blocks whose rows are kept"


@pytest.mark.slow
def test_two_hundred_requests_with_random_cancellations(llava: Path) -> None:
    method = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125])
    asked = questions(REQUESTS, seed=7)
    wanted = expected(llava, asked, method)
    draw = random.Random(0)
    done: dict[str, list[int]] = {}
    cancelled: set[str] = set()
    preempted = 0
    # Few blocks and a small budget: preemption and prompts in parts are the rule.
    with engine(llava, method, max_model_len=192, num_gpu_blocks_override=40, max_num_batched_tokens=40) as llm:
        core, of = llm.llm_engine, scheduler(llm)
        batch = core.model_executor.driver_worker.model_runner.get_model().pyramiddrop_batch
        waiting = list(enumerate(asked))
        while waiting or core.has_unfinished_requests():
            while waiting and len(of.requests) < 12:
                number, question = waiting.pop(0)
                core.add_request(str(number), question.inputs, sampling(question.tokens))
            for output in core.step():
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
            preempted = max(preempted, sum(request.num_preemptions for request in of.requests.values()))
            for number in range(REQUESTS):
                name = str(number)
                alive = name not in done and name not in cancelled and number not in [n for n, _ in waiting]
                if alive and draw.random() < CANCELLED / 30:
                    core.abort_request([name])
                    cancelled.add(name)
        core.add_request("last", asked[2].inputs, sampling(2))  # one more step tells the worker of the last to end
        while core.has_unfinished_requests():
            core.step()
        assert blocks_in_use(of) == 0
        assert not of.dropped
        assert not of.requests
        assert not batch.waiting
    assert preempted
    assert len(cancelled) > REQUESTS * CANCELLED / 4
    assert len(done) + len(cancelled - done.keys()) == REQUESTS
    finished = {name: tokens for name, tokens in done.items() if name not in cancelled}
    assert finished == {name: wanted[int(name)] for name in finished}
