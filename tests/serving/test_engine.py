"""vLLM's engine under dropping: the tokens of the `hf` adapter, whatever the batch, the order and the memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm sets up an environment that has it")

from served import Question, answers, blocks_in_use, engine, expected, picture, questions, save_served, scheduler

from pyramiddrop import FastV, Method, PyramidDrop, RandomDrop, UniformDrop
from pyramiddrop.vllm import attention, forward, kv_cache, runner
from pyramiddrop.vllm.batch import Batch, ScheduledRequest
from pyramiddrop.vllm.prefix_rows import Rows

HALVES = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125])
UNEVEN = PyramidDrop(layers=[1, 2, 7], keep=[0.7, 0.3, 0.3])  # neighbours, the last layer, an end that drops nothing
EXIT = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.0])  # from layer 6 on the cache holds text alone
ASKED = questions()
# A model of 192 tokens at most: 6 blocks of 32 in each of 4 groups.
FEW_BLOCKS = {"max_model_len": 192, "num_gpu_blocks_override": 26}


@pytest.fixture(scope="module")
def halves(llava: Path) -> list[list[int]]:
    return expected(llava, ASKED, HALVES)


@pytest.fixture(scope="module")
def vanilla(llava: Path) -> list[list[int]]:
    return expected(llava, ASKED, None)


class SchedulerRecorder:
    """What went on in the scheduler."""

    def __init__(self) -> None:
        self.peak = self.preempted = self.parts = 0

    def __call__(self, of: Any) -> None:
        self.peak = max(self.peak, blocks_in_use(of))
        self.preempted = max(self.preempted, sum(request.num_preemptions for request in of.requests.values()))
        self.parts += sum(
            any(of.dropped[request.request_id]) and 0 < request.num_computed_tokens < request.num_prompt_tokens
            for request in of.running
        )


def nothing_left(llm: Any) -> bool:
    of = scheduler(llm)
    worker = llm.llm_engine.model_executor.driver_worker
    batch = worker.model_runner.get_model().pyramiddrop_batch
    return blocks_in_use(of) == 0 and not of.dropped and not batch.waiting


def test_staggered_arrivals_of_mixed_requests(llava: Path, halves: list[list[int]], vanilla: list[list[int]]) -> None:
    assert sum(one != other for one, other in zip(halves, vanilla, strict=True)) >= 8, "dropping must change answers"
    with engine(llava, HALVES) as llm:
        groups = scheduler(llm).kv_cache_config.kv_cache_groups
        assert [(group.kv_cache_spec.stage, len(group.layer_names)) for group in groups] == [(k, 2) for k in range(4)]
        assert answers(llm, ASKED, every=2) == halves
        assert answers(llm, ASKED) == halves, "all at once"
        assert answers(llm, ASKED[::-1], every=3) == halves[::-1], "in another order"
        assert nothing_left(llm)


def test_a_stage_holds_blocks_for_what_it_keeps(llava: Path) -> None:
    asked = [question for question in questions(8, seed=4, tokens=(4, 4)) if len(question.images) == 2]
    peaks = {}
    for name, method in {"all": PyramidDrop(lam=1.0), "few": PyramidDrop(lam=0.1)}.items():
        watch = SchedulerRecorder()
        with engine(llava, method) as llm:
            answers(llm, asked, watch=watch)
        peaks[name] = watch.peak
    assert peaks["few"] < peaks["all"]


def test_preemption(llava: Path, halves: list[list[int]]) -> None:
    watch = SchedulerRecorder()
    with engine(llava, HALVES, **FEW_BLOCKS) as llm:
        assert answers(llm, ASKED, watch=watch) == halves
        assert nothing_left(llm)
    assert watch.preempted, "the memory was not tight enough to show anything"


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("budget", [8, 24])
def test_a_tight_token_budget_computes_prompts_in_parts(
    llava: Path, halves: list[list[int]], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, sizes = SchedulerRecorder(), set()
    begin = Batch.begin

    def watched(self: Batch, *described: Any) -> None:
        begin(self, *described)
        sizes.update(entry.scheduled for entry in self.step.entries if entry.has_visual)

    monkeypatch.setattr(Batch, "begin", watched)
    with engine(llava, HALVES, max_num_batched_tokens=budget) as llm:
        assert answers(llm, ASKED, every=1, watch=watch) == halves
        assert nothing_left(llm)
    assert watch.parts, "no prompt was cut"
    assert 1 not in sizes, "a part of one token would be replayed as a graph of decoding"


def test_preemption_amid_parts(llava: Path, halves: list[list[int]]) -> None:
    watch = SchedulerRecorder()
    with engine(llava, HALVES, max_num_batched_tokens=24, **FEW_BLOCKS) as llm:
        assert answers(llm, ASKED, watch=watch) == halves
        assert nothing_left(llm)
    assert watch.preempted
    assert watch.parts


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (UNEVEN, {}),
        (FastV(layer=2, keep=0.25), {"max_num_batched_tokens": 24}),
        (PyramidDrop(lam=0.4, stages=3, per_image=True, rank_layer="last"), {"max_num_batched_tokens": 40}),
        (UniformDrop(lam=0.4), {}),
        (RandomDrop(lam=0.4, seed=3), {"max_num_batched_tokens": 40}),
        (PyramidDrop(lam=0.4, reserve=0.5), {"max_num_batched_tokens": 40}),
        (PyramidDrop(lam=0.4, score="top_heads", random_from=4, per_image=True), {}),
        (FastV(layer=3, keep=0.4, score="diversity"), {"max_num_batched_tokens": 24}),
        (PyramidDrop(lam=0.4, score="debiased"), {"max_num_batched_tokens": 40}),
        (EXIT, {"max_num_batched_tokens": 40}),
    ],
    ids=[
        "uneven",
        "fastv",
        "per image, last layer ranks",
        "uniform",
        "random",
        "a grid reserved",
        "top heads, then chance",
        "diversity",
        "debiased, the last stage from two tokens",
        "no visual token in the last stage",
    ],
)
def test_methods(llava: Path, method: Method, options: dict[str, Any]) -> None:
    with engine(llava, method, **options) as llm:
        assert answers(llm, ASKED, every=2) == expected(llava, ASKED, method)
        assert nothing_left(llm)


def test_llava_next(llava_next: Path) -> None:
    asked = questions(12, seed=2)
    with engine(llava_next, HALVES, max_num_batched_tokens=64) as llm:
        assert answers(llm, asked, every=2) == expected(llava_next, asked, HALVES)
        assert nothing_left(llm)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("family", ["llava-mistral", "llava-qwen2", "llava-qwen3"])
def test_other_text_models(tmp_path: Path, family: str) -> None:
    folder, asked = save_served(tmp_path, family), questions(6, seed=3)
    with engine(folder, HALVES, max_num_batched_tokens=40) as llm:
        assert answers(llm, asked, every=2) == expected(folder, asked, HALVES)


@pytest.mark.slow
def test_compiled(llava: Path, halves: list[list[int]]) -> None:
    """Steps without a picture's prompt run the compiled forward, as vLLM's default is."""
    with engine(llava, HALVES, enforce_eager=False) as llm:
        assert answers(llm, ASKED, every=2) == halves


def test_keep_all_is_plain_vllm(llava: Path, vanilla: list[list[int]]) -> None:
    with engine(llava, None) as llm:
        plain = answers(llm, ASKED, every=2)
    with engine(llava, PyramidDrop(lam=1.0)) as llm:
        assert answers(llm, ASKED, every=2) == plain
    assert plain == vanilla


def test_an_image_that_ends_the_prompt_asks_for_itself(llava: Path) -> None:
    """The query is a visual token then: it stays, for the answer is read off its row."""
    asked = [Question(f"w5 w{number} <image>", (picture(number),), 6) for number in range(20, 26)]
    for method in (PyramidDrop(lam=0.3), EXIT):
        with engine(llava, method, max_num_batched_tokens=15) as llm:
            assert answers(llm, asked, every=1) == expected(llava, asked, method)


def test_pictures_that_do_not_fit_into_the_encoder_s_cache_together(llava: Path) -> None:
    """vLLM then cuts a prompt just before a picture: no part may end so that a single token is left there."""
    words = [" ".join(f"w{number + place}" for place in range(number)) for number in range(1, 19)]
    asked = [
        Question(f"{text} <image> <image> w7 w8", (picture(number), picture(50 + number)), 4)
        for number, text in enumerate(words)
    ]
    wanted = expected(llava, asked, HALVES)
    with engine(llava, HALVES, max_num_batched_tokens=17, max_num_seqs=2) as llm:
        assert answers(llm, asked) == wanted
        assert nothing_left(llm)


def test_steps_of_decoding_are_described_in_the_same_buffers(
    llava: Path, halves: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a captured graph of decoding reads: no CPU can capture one, but its addresses can be watched."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    addresses: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    build = CPUAttentionMetadataBuilder.build

    def watched(self: Any, prefix: int, common: Any, *args: Any) -> Any:
        stage = self.kv_cache_spec.stage
        if stage and self._batch.step is not None and not self._batch.step.has_visual:
            read = (common.seq_lens, common.slot_mapping, common.query_start_loc, common.block_table_tensor)
            addresses[stage].add(tuple(tensor.data_ptr() for tensor in read))
        return build(self, prefix, common, *args)

    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", watched)
    with engine(llava, HALVES) as llm:
        assert answers(llm, ASKED, every=2) == halves
    assert {stage: len(found) for stage, found in addresses.items()} == {1: 1, 2: 1, 3: 1}


# Negative controls: each breaks one idea, and must be seen by the comparison above.


@pytest.fixture(scope="module")
def served(llava: Path) -> Iterator[Any]:
    with engine(llava, HALVES, max_num_batched_tokens=48, **FEW_BLOCKS) as llm:
        yield llm


def broken(llm: Any, halves: list[list[int]]) -> bool:
    """Whether the answers are wrong. The requests that a broken step leaves behind are thrown away."""
    try:
        return answers(llm, ASKED) != halves
    except (RuntimeError, IndexError):
        return True
    finally:
        llm.llm_engine.abort_request([str(number) for number in range(len(ASKED))], internal=False)


def test_the_unbroken_engine_is_right(served: Any, halves: list[list[int]]) -> None:
    assert not broken(served, halves)


def test_control_decoding_that_forgets_what_was_dropped(
    served: Any, halves: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_dropped = ScheduledRequest.num_dropped
    monkeypatch.setattr(
        ScheduledRequest, "num_dropped", lambda self, stage: num_dropped(self, stage) if self.has_visual else 0
    )
    assert broken(served, halves)


def test_control_a_resumed_request_ranked_by_its_last_token(
    served: Any, halves: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranked_by_last(*args: Any) -> Any:
        selector = survive(*args)
        selector.asking = args[1] - 1
        return selector

    survive = forward.TokenSelector
    monkeypatch.setattr(forward, "TokenSelector", ranked_by_last)
    assert broken(served, halves)


def test_control_the_first_rows_stay(served: Any, halves: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = forward.TokenSelector.scores
    monkeypatch.setattr(forward.TokenSelector, "scores", lambda *args: -scores(*args))
    assert broken(served, halves)


def test_control_slots_of_the_full_length(
    served: Any, halves: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_write_slots", lambda common, block_size: common.slot_mapping.zero_())
    assert broken(served, halves)


def test_control_parts_that_leave_nothing(
    served: Any, halves: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Rows.copied
    monkeypatch.setattr(Rows, "copied", lambda rows: copied(replace(rows, hidden=rows.hidden * 0)))
    assert broken(served, halves)


def test_a_lost_hook_is_an_error_and_no_wrong_answer(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_begin", lambda runner, batch, scheduled: setattr(batch, "step", None))
    with (
        engine(llava, HALVES) as llm,
        pytest.raises(RuntimeError, match="a step with a picture reached the layers without a description"),
    ):
        answers(llm, ASKED)


@pytest.mark.slow
def test_control_blocks_for_every_token_save_nothing(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [question for question in questions(8, seed=4, tokens=(4, 4)) if len(question.images) == 2]
    peaks = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(kv_cache.StageManager, "_held", lambda self, request_id, tokens: tokens)
        watch = SchedulerRecorder()
        with engine(llava, PyramidDrop(lam=0.1)) as llm:
            answers(llm, asked, watch=watch)
        peaks.append(watch.peak)
    assert peaks[0] < peaks[1]
