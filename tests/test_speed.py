"""Measured speed: fair turns, sums of made-up clocks, memory that is known, and a cache as predicted."""

from __future__ import annotations

import re
import sys
from itertools import count, groupby
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pyramiddrop.hf import query_key
from pyramiddrop.inference import InputError
from pyramiddrop.inference.timing import Clock, CpuClock, Spread, WallClock, clock_for, in_turn
from pyramiddrop.speed import generation, training
from pyramiddrop.speed.memory import peak_memory
from pyramiddrop.speed.predicted import choose_variants, predict, predict_step
from pyramiddrop.speed.record import generation_records, training_records
from pyramiddrop.speed.subject import SHAPES, Subject, shape_subject
from pyramiddrop.speed.training import measure_training, training_variants

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


class Ticks(Clock):
    """Each mark is one second after the one before."""

    name = "ticks"

    def __init__(self) -> None:
        self.marks = count()

    def mark(self) -> int:
        return next(self.marks)

    def seconds(self, start: int, end: int) -> float:
        return float(end - start)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return shape_subject("tiny", CPU, visual=30, text=10)


def variants_for(subject: Subject, *methods: str) -> Any:
    return choose_variants(methods, subject.info.shape, subject.prompt)


def test_each_round_has_all_ways_and_starts_with_another() -> None:
    assert list(in_turn("abc", 4)) == [
        *((0, variant) for variant in "abc"),
        *((1, variant) for variant in "bca"),
        *((2, variant) for variant in "cab"),
        *((3, variant) for variant in "abc"),
    ]


def test_spread() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 5.0, 3.0]) == Spread(3.0, 2.0, 4.0, (4.0, 1.0, 2.0, 5.0, 3.0))
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75, (1.0, 2.0))
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, (7.0,))


def test_several_threads_are_timed_on_the_wall() -> None:
    assert type(clock_for(CPU, 1)) is CpuClock
    assert type(clock_for(CPU, 2)) is WallClock


def test_peak_memory_is_the_most_at_one_moment() -> None:
    def work() -> None:
        first = torch.zeros(1000, dtype=torch.float64)
        del first
        second, third = torch.zeros(500, dtype=torch.float64), torch.zeros(700, dtype=torch.float64)
        del second, third

    work()
    with peak_memory(CPU) as peak:
        work()
    assert peak.bytes == pytest.approx(1200 * 8, abs=256)  # the allocator rounds up to 64 bytes a tensor


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["tiny", "qwen2.5-vl-7b", "internvl3-8b"])
def test_the_cache_holds_what_is_predicted(monkeypatch: pytest.MonkeyPatch, name: str, batch: int) -> None:
    shape = SHAPES[name][0]
    changes = {"hidden": 32, "intermediate": 48, "head_dim": 8, "vocabulary": 50, "layers": 8}
    monkeypatch.setitem(SHAPES, name, (type(shape)(**(vars(shape) | changes)), 33))
    subject = shape_subject(name, CPU, text=9)
    variants = variants_for(subject, "pyramiddrop", "fastv", "random:lam=0.3", "uniform:layers=1,2:keep=0.9,0.1")
    found = generation.measure_generation(subject, variants, batch, 2, 1, Ticks())
    for result, variant in zip(found, variants, strict=True):
        assert (
            result.kv_bytes
            == result.predicted.kv_bytes
            == predict(variant, subject.info.shape, subject.prompt, batch).kv_bytes
        )
    assert len({result.kv_bytes for result in found}) == len(variants)


def test_a_padded_batch_of_several_pictures() -> None:
    subject = shape_subject("tiny", CPU, visual=33, text=12, pictures=4, padded=True)
    runs = [len(list(group)) for visual, group in groupby(subject.visual[0].tolist()) if visual]
    assert (runs, subject.pictures) == ([8, 8, 8, 9], 4)
    assert (subject.prompt.visual_tokens, subject.prompt.text_tokens, subject.prompt.instruction_tokens) == (33, 12, 6)
    padding = (subject.batch(3)["attention_mask"] == 0).sum(1).tolist()
    assert padding == [0, 1, 2]
    assert not subject.batch(1)["attention_mask"].eq(0).any()
    variants = variants_for(subject, "pyramiddrop:per_image=true")
    vanilla, pruned = generation.measure_generation(subject, variants, 3, 2, 1, Ticks())
    assert pruned.kv_bytes < vanilla.kv_bytes
    with subject.under(variants[1].method) as trace, torch.no_grad():
        subject.model(**subject.batch(3))
    num_keep = [len(kept) for kept in trace.stages[0].kept]
    assert num_keep == [4 * 4] * 3


def test_a_trace_predicts_the_same_flops(subject: Subject) -> None:
    for variant in variants_for(subject, "pyramiddrop", "fastv", "pyramiddrop:score=instruction")[1:]:
        with subject.under(variant.method) as trace:
            subject.model(**subject.batch(2))
        assert trace.cost().flops == predict(variant, subject.info.shape, subject.prompt, 2).flops


def test_causal_attention_skips_almost_half_of_the_pairs(subject: Subject) -> None:
    shape, rows = subject.info.shape, 40
    vanilla = predict(variants_for(subject, "fastv")[0], shape, subject.prompt, 1)
    pairs = (vanilla.flops - vanilla.causal_flops) / (4 * shape.layers * shape.heads * shape.head_dim)
    assert pairs == rows * (rows - 1) / 2


def test_generation_by_a_made_up_clock(subject: Subject) -> None:
    variants, ticks = variants_for(subject, "pyramiddrop"), count()
    vanilla, pruned = generation.measure_generation(subject, variants, 1, 4, 3, Ticks(), lambda: next(ticks))
    assert next(ticks) == 2 * (1 + 3)  # the warm-up moves the bar, too
    layers = subject.info.shape.layers
    for result in (vanilla, pruned):
        # A pair of marks around each hook: of the wrapper, the text model before and after, and each layer.
        assert result.dropping == Spread.of([layers + 3.0] * 3)
        assert result.first_token.median == 2 * (layers + 3) + 2  # those, the text model's start, and the token itself
        assert result.step is not None
        assert result.step.median == 1.0
        assert result.whole.median == result.first_token.median + 3 + 1
        assert len(result.whole.runs) == 3
        assert result.peak_bytes > 0
    one_token = generation.measure_generation(subject, variants, 1, 1, 1, Ticks())
    assert [result.step for result in one_token] == [None, None]


def test_what_a_method_asks_once_is_asked_before_the_clock_runs(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_key, "_extractors", WeakKeyDictionary())  # other tests have asked the same layers
    asked, agree = [], query_key._agree
    monkeypatch.setattr(query_key, "_agree", lambda *given: asked.append(given) or agree(*given))
    watch = generation._PrefillWatch(subject.info, Ticks())
    watch.before_method()
    with subject.under(variants_for(subject, "pyramiddrop")[1].method), torch.inference_mode():
        watch.after_method()
        generation._settle(subject, subject.batch(1), watch)
        assert len(asked) == 3
        assert watch.spans == {True: [], False: []}
        subject.model(**subject.batch(1))
    watch.remove()
    assert len(asked) == 3
    assert watch.spans[True]


class FakeEvent:
    """Stands in for CUDA's: a stream's work is done at once, and each mark is 250 ms after the one before."""

    made: ClassVar[list[FakeEvent]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.stream: Any = None
        self.waited = False
        self.made.append(self)

    def record(self, stream: Any) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.waited, "the time of an event that was not waited for is not known"
        return 250.0 * (self.made.index(end) - self.made.index(self))


def test_cuda_events_are_marked_on_the_stream_of_the_device_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = clock_for(torch.device("cuda:1"), 1)
    start, end = clock.mark(), clock.mark()
    assert start.stream == end.stream == "stream of cuda:1"
    assert not start.waited
    assert clock.seconds(start, end) == 0.25


def test_the_model_is_bare_afterwards(subject: Subject) -> None:
    variants = variants_for(subject)
    generation.measure_generation(subject, variants, 1, 2, 1, Ticks())
    measure_training(subject, training_variants(variants)[:3], 1, 1, Ticks())
    for module in subject.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module.training
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in subject.model.modules())


def test_runs_take_turns(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], generation._generate
    monkeypatch.setattr(
        generation, "_generate", lambda one, variant, *rest: seen.append(variant.label) or original(one, variant, *rest)
    )
    generation.measure_generation(subject, variants_for(subject), 1, 1, 2, Ticks())
    names = ["vanilla", "PyramidDrop", "FastV"]
    assert seen == [*names, *names[1:], names[0], names[2], *names[:2]]


def test_ratios_are_to_vanilla_of_the_same_batch(subject: Subject) -> None:
    variants = variants_for(subject, "pyramiddrop")
    found = [row for batch in (1, 2) for row in generation.measure_generation(subject, variants, batch, 2, 1, Ticks())]
    records = generation_records(found)
    assert [record["batch"] for record in records] == [1, 1, 2, 2]
    assert records[0]["ratios"]["kv_bytes"] == records[2]["ratios"]["kv_bytes"] == 1
    assert records[1]["ratios"] == {**records[3]["ratios"], "peak_bytes": records[1]["ratios"]["peak_bytes"]}
    assert records[1]["of_predicted"] == records[1]["ratios"]["flops"] < 1  # by a clock that dropping does not move


def test_training_measures_every_way(subject: Subject) -> None:
    weights = [parameter.detach().clone() for parameter in subject.model.parameters()]
    variants = training_variants(variants_for(subject, "pyramiddrop"))
    assert [(variant.cost.label, variant.logits, variant.checkpointing) for variant in variants] == [
        (label, logits, checkpointing)
        for checkpointing in (False, True)
        for label, logits in (("vanilla", "full"), ("PyramidDrop", "full"), ("PyramidDrop", "kept"))
    ]
    found = measure_training(subject, variants, 2, 2, Ticks())
    assert {(one.forward.median, one.backward.median, one.gradients.median) for one in found} == {(1.0, 1.0, 2.0)}
    assert {one.optimizer and one.optimizer.median for one in found} == {1.0}
    vanilla, full, kept, *_ = found
    assert vanilla.peak_bytes > full.peak_bytes > kept.peak_bytes
    assert vanilla.predicted_flops > full.predicted_flops > kept.predicted_flops
    records = training_records(found)
    assert [record["ratios"]["flops"] for record in records if record["variant"] == "vanilla"] == [1.0, 1.0]
    for before, after in zip(weights, subject.model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_training_without_an_optimizer(subject: Subject) -> None:
    variants = training_variants(variants_for(subject, "fastv"))[:1]
    (result,) = measure_training(subject, variants, 1, 1, Ticks(), optimizer=False)
    assert result.optimizer is None
    assert result.whole == result.gradients


def test_training_adapters_leaves_the_model_as_it_was(subject: Subject) -> None:
    """Less memory than all weights take, fewer FLOPs, and neither adapters nor frozen weights afterwards."""
    pytest.importorskip("peft")
    before = {name: parameter.detach().clone() for name, parameter in subject.model.named_parameters()}
    variants = training_variants(variants_for(subject, "pyramiddrop"))[:2]
    whole = measure_training(subject, variants, 1, 1, Ticks())
    adapted = measure_training(subject, variants, 1, 1, Ticks(), lora_rank=2)
    for one, other in zip(whole, adapted, strict=True):
        assert 0 < other.peak_bytes < one.peak_bytes
        assert one.predicted_flops / 2 < other.predicted_flops < one.predicted_flops
    assert {name for name, _ in subject.model.named_parameters()} == before.keys()
    for name, parameter in subject.model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])


@pytest.mark.slow
def test_training_flops_against_the_counter_of_pytorch() -> None:
    subject = shape_subject("tiny", CPU, visual=30, text=10)
    subject.model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    subject.inputs["inputs_embeds"].requires_grad_()  # as behind a projector that is trained
    for variant in training_variants(variants_for(subject, "pyramiddrop")):
        measure_training(subject, [variant], 1, 1, Ticks(), optimizer=False)  # a first ranking checks itself
        with training._training(subject.model), FlopCounterMode(display=False) as counter:
            training._gradients(subject, variant, 1, Ticks())
        (result,) = measure_training(subject, [variant], 1, 1, Ticks(), optimizer=False)
        assert result.predicted_flops == pytest.approx(counter.get_total_flops(), rel=0.01), variant
        with pytest.MonkeyPatch.context() as patch:  # what LoRA leaves of it, without the adapters
            for parameter in subject.model.parameters():
                patch.setattr(parameter, "requires_grad", False)
            with training._training(subject.model), FlopCounterMode(display=False) as counter:
                training._gradients(subject, variant, 1, Ticks())
        kept, shape = variant.logits == "kept", subject.info.shape
        frozen = predict_step(variant.cost, shape, subject.prompt, 1, kept, variant.checkpointing, frozen=True)
        assert frozen == pytest.approx(counter.get_total_flops(), rel=0.01), variant


def test_random_weights_are_made_the_same_each_time_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = (shape_subject("tiny", CPU, depth=4, visual=4, text=4) for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first.model.lm_head.weight, second.model.lm_head.weight)
    assert torch.equal(first.inputs["inputs_embeds"], second.inputs["inputs_embeds"])
    assert first.visual.int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    assert (first.labels[0] != -100).tolist() == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "llava"}, "shape 'llava' is not one of tiny, small, small-16k, mid, deep, llava-1.5-7b"),
        ({"name": "tiny", "depth": 9}, "--num-layers must be in 1..8"),
        ({"name": "tiny", "dtype": "auto"}, "a checkpoint's own"),
        ({"name": "tiny", "dtype": "int8"}, "dtype 'int8' is not one of"),
    ],
)
def test_shapes_that_cannot_be_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shape_subject(**{"device": CPU, **arguments})


def test_weights_that_do_not_fit_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyramiddrop.speed.subject.total_memory", lambda device: 8 * 2**30)
    with pytest.raises(InputError, match=r"32 layers of llava-1.5-7b take 25\.\d GiB in float32.*has 8\.0; run fewer"):
        shape_subject("llava-1.5-7b", CPU)


def test_the_document_shows_what_the_result_files_hold() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from speed_document import DOCUMENT, filled

    text = DOCUMENT.read_text(encoding="utf-8")
    assert filled(text) == text, "run python benchmarks/speed_document.py"
    named = set(re.findall(r"<!-- begin (\S+) -->", text))
    assert named - {"*-cuda.json"} == {path.name for path in (ROOT / "benchmarks" / "results").glob("*-cpu.json")}
