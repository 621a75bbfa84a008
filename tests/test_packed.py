"""Packed rows: each of several documents in a row is dropped from and answered as if it were alone.

Rows are packed by Transformers' own collator, and masked by Transformers' own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, DynamicCache, PreTrainedModel

import reference
from checks import HALVES, method_of
from flash_cpu import flash_on_cpu
from pyramiddrop import FastV, Method, PyramidDrop, RandomDrop, UniformDrop, VisionDrop
from pyramiddrop.scoring import ScorerInputs, UniformScorer
from tiny import Answer, Row, collate, make_rows, text_model, tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
SPECS: list[list[Any]] = [
    [5, "image", 7, Answer(3)],
    [3, "image", 2, "image", 4, Answer(4), 3, Answer(2)],
    [6, Answer(2)],
    ["image", 4, Answer(2)],
    ["image", 2, Answer(3), "image", 2, Answer(2)],
]
LAYERS: dict[str, Any] = {"layers": [2, 4, 6], "keep": [0.5, 0.25, 0.125]}
METHODS: dict[str, Method] = {
    "pyramid": PyramidDrop(**LAYERS),
    "per image": PyramidDrop(**LAYERS, per_image=True),
    "compact": PyramidDrop(**LAYERS, positions="compact"),
    "last": PyramidDrop(**LAYERS, rank_layer="last"),
    "merge": PyramidDrop(**LAYERS, merge=True),
    "merge per image": PyramidDrop(layers=[2, 4, 6], keep=[0.6, 0.57, 0.2], merge=True, per_image=True),
    "reserve": PyramidDrop(**LAYERS, reserve=0.5, random_from=6),
    "random": RandomDrop(**LAYERS),
    "uniform": UniformDrop(**LAYERS),
    "fastv": FastV(layer=2, keep=0.4),
    "vision": VisionDrop(keep=0.5),
    "composed": VisionDrop(keep=0.5) | PyramidDrop(layers=[2, 4], keep=[0.5, 0.25]),
    **{
        score: PyramidDrop(**LAYERS, score=score)
        for score in ("instruction", "top_heads", "debiased", "rope_free", "key_norm", "variation", "diversity")
    },
}
WAYS = ("sdpa", "eager", "flash by positions", "flash by bounds", "bool mask", "additive mask")


@cache
def model() -> PreTrainedModel:
    return tiny_model("llava-gqa")


@cache
def documents() -> list[Row]:
    return make_rows(model(), SPECS)


def alone(row: Row, labels: bool) -> dict[str, Tensor]:
    """A document as a batch of its own."""
    inputs = collate([row], labels=labels)
    del inputs["attention_mask"]
    return inputs


def packed(rows: Sequence[Row], labels: bool, bounds: bool = False) -> dict[str, Any]:
    """The documents in one row, as Transformers' collator packs them."""
    features = [{"input_ids": row.ids, "labels": row.labels} for row in rows]
    inputs: dict[str, Any] = DataCollatorWithFlattening(return_flash_attn_kwargs=bounds)(features, return_tensors="pt")
    if not labels:
        del inputs["labels"]
    return {**inputs, "pixel_values": torch.stack([image for row in rows for image in row.pixels])}


def block_mask(inputs: dict[str, Any], additive: bool) -> Tensor:
    """(1, 1, L, L) causal within each document."""
    numbers = (inputs["position_ids"] == 0).cumsum(1)
    length = numbers.shape[1]
    seen = (numbers[:, :, None] == numbers[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    if not additive:
        return seen[:, None]
    return torch.zeros(1, 1, length, length).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)


def running(way: str) -> AbstractContextManager[None]:
    """The attention implementation of a way to say that rows are packed."""
    if way.startswith("flash"):
        return flash_on_cpu(text_model(model()))
    if way == "eager":
        return reference.eager(text_model(model()))
    return nullcontext()


def inputs_of(way: str, labels: bool) -> dict[str, Any]:
    inputs = packed(documents(), labels, way == "flash by bounds")
    if way.endswith("mask"):
        inputs["attention_mask"] = block_mask(inputs, way == "additive mask")
    return inputs


def one_by_one(method: Method, labels: bool) -> tuple[list[list[int]], Tensor]:
    """What each document keeps at each stage, by its column in the packed row; and the logits, (1, L, V)."""
    kept: list[list[int]] = [[] for _ in LAYERS["layers"]]
    logits, first = [], 0
    for row in documents():
        with method(model()) as trace:
            logits.append(model()(**alone(row, labels), use_cache=False).logits)
        for stage, columns in zip(trace.stages, kept, strict=False):
            columns += [column + first for column in stage.kept[0].tolist()]
        first += len(row.ids)
    return kept[: len(trace.stages)], torch.cat(logits, 1)


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "prompts"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["pyramid", "per image", "compact", "merge"])
def test_each_document_is_as_alone_however_the_row_is_packed(name: str, way: str, labels: bool) -> None:
    check(METHODS[name], way, labels)


@pytest.mark.fast_cases(7)
@pytest.mark.parametrize("way", ["sdpa", "flash by positions"])
@pytest.mark.parametrize("name", METHODS)
def test_each_document_is_as_alone_under_any_method(name: str, way: str) -> None:
    check(METHODS[name], way, labels=True)


@torch.no_grad()
def check(method: Method, way: str, labels: bool) -> None:
    with running(way):
        kept, logits = one_by_one(method, labels)
        with method(model()) as trace:
            got = model()(**inputs_of(way, labels), use_cache=False).logits
    assert [stage.kept[0].tolist() for stage in trace.stages] == kept
    torch.testing.assert_close(got, logits, **CLOSE)


def test_what_each_document_keeps_is_what_the_slow_reference_keeps() -> None:
    with torch.no_grad(), method_of(HALVES)(model()) as trace:
        model()(**packed(documents(), labels=True), use_cache=False)
    expected: list[list[int]] = [[], [], []]
    first = 0
    for row in documents():
        if row.pixels:
            with torch.no_grad():
                result = reference.train(model(), HALVES, collate([row], labels=True))
            for columns, of_stage in zip(expected, result.kept, strict=True):
                columns += [column + first for column in of_stage[0].tolist()]
        first += len(row.ids)
    assert [stage.kept[0].tolist() for stage in trace.stages] == expected


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("logits", ["full", "kept"])
@pytest.mark.parametrize("way", ["sdpa", "flash by positions"])
def test_loss_and_gradients_are_those_of_the_documents(way: str, logits: str, reentrant: bool | None) -> None:
    method = PyramidDrop(**LAYERS, logits=logits)
    network = model()
    parameter = text_model(network).layers[1].mlp.up_proj.weight

    def gradient(*batches: dict[str, Any]) -> Tensor:
        network.zero_grad()
        with running(way), method(network):
            for batch in batches:
                (network(**batch, use_cache=False, num_items_in_batch=1).loss).backward()
        grad = parameter.grad
        assert grad is not None
        return grad.clone()

    expected = gradient(*(alone(row, True) for row in documents()))
    network.train()
    if reentrant is not None:
        network.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        got = gradient(inputs_of(way, True))
    finally:
        network.gradient_checkpointing_disable()
        network.eval()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_batch_of_packed_rows_of_which_some_are_padded() -> None:
    """With a mask of four dimensions, for Transformers ignores packing beside one of two."""
    network, method = model(), METHODS["per image"]
    rows = [packed(documents()[:3], True), packed(documents()[3:], True)]
    width = max(row["input_ids"].shape[1] for row in rows) + 2
    batch: dict[str, Any] = {"pixel_values": torch.cat([row["pixel_values"] for row in rows])}
    for name, filler in (("input_ids", 0), ("labels", -100), ("position_ids", 0)):
        batch[name] = torch.cat(
            [torch.nn.functional.pad(row[name], (0, width - row[name].shape[1]), value=filler) for row in rows]
        )
    masks = [block_mask(row, False) for row in rows]
    more = [width - mask.shape[-1] for mask in masks]
    batch["attention_mask"] = torch.cat(
        [torch.nn.functional.pad(mask, (0, n, 0, n)) for mask, n in zip(masks, more, strict=True)]
    )
    with method(network) as trace:
        singles = []
        for row in rows:
            logits = network(**row, use_cache=False).logits
            singles.append(([stage.kept[0].tolist() for stage in trace.stages], logits))
        together = network(**batch, use_cache=False).logits
    for number, (kept, logits) in enumerate(singles):
        assert [stage.kept[number].tolist() for stage in trace.stages] == kept
        torch.testing.assert_close(together[number, : logits.shape[1]], logits[0], **CLOSE)


@torch.no_grad()
def test_beside_a_two_dimensional_mask_documents_see_each_other_as_they_do_in_the_model() -> None:
    """Transformers packs no row that comes with such a mask; quotas and queries are each document's all the same."""
    inputs = packed(documents(), labels=True)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with METHODS["pyramid"](model()) as trace:
        model()(**inputs, use_cache=False)
        counts = [len(stage.kept[0]) for stage in trace.stages]
    kept, _ = one_by_one(METHODS["pyramid"], True)
    assert counts == [len(columns) for columns in kept]
    keep_all = PyramidDrop(layers=[2], keep=[1.0])
    with keep_all(model()):
        patched = model()(**inputs, use_cache=False).logits
    assert torch.equal(patched, model()(**inputs, use_cache=False).logits)


def test_what_cannot_be_followed_is_refused() -> None:
    inputs = packed(documents(), labels=True)
    with torch.no_grad(), METHODS["pyramid"](model()):
        cache = DynamicCache(config=model().config.get_text_config())
        model()(input_ids=torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
        with pytest.raises(ValueError, match="several documents in one row"):
            model()(**inputs, past_key_values=cache)
        twice = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
        bounds = packed(documents(), labels=True, bounds=True)["cu_seq_lens_q"]
        with pytest.raises(ValueError, match="cu_seq_lens_q must describe one row"):
            model()(**twice, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("spec", [[3, "image", 6], ["image", 6]])
def test_gaps_that_we_leave_are_never_taken_for_packed_rows(spec: list[Any], positions: str) -> None:
    """Transformers' flash path would read them so: one document has the logits that SDPA gives it."""
    inputs = collate(make_rows(model(), [spec]))
    for method in (PyramidDrop(**LAYERS, positions=positions), VisionDrop(keep=0.5, positions=positions)):
        with method(model()):
            expected = model()(**inputs).logits
            with flash_on_cpu(text_model(model())):
                got = model()(**inputs).logits
        torch.testing.assert_close(got, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("way", ["sdpa", "flash by bounds"])
def test_compact_positions_start_again_with_each_document(way: str) -> None:
    """Logits would not tell: rotation sees differences alone."""
    seen: list[Tensor] = []

    def note(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"][0])

    with running(way), METHODS["compact"](model()) as trace:
        handle = text_model(model()).layers[-1].register_forward_pre_hook(note, with_kwargs=True)
        try:
            model()(**inputs_of(way, True), use_cache=False)
        finally:
            handle.remove()
    kept, first = trace.stages[-1].kept[0], 0
    expected: list[int] = []
    for row in documents():
        visual = sum(token == model().config.image_token_id for token in row.ids)
        left = int(((kept >= first) & (kept < first + len(row.ids))).sum())
        expected += range(len(row.ids) - visual + left)
        first += len(row.ids)
    assert seen[0].tolist() == expected


@torch.no_grad()
def test_a_document_does_not_ask_for_the_first_word_of_the_next() -> None:
    """Which a collator of one's own may supervise; a document alone never predicts its first token."""
    rows = make_rows(model(), [[5, "image", 7], [Answer(4), "image", 3, Answer(2)]])
    inputs = packed(rows, labels=True)
    first = len(rows[0].ids)
    inputs["labels"][0, first] = inputs["input_ids"][0, first]
    with METHODS["pyramid"](model()) as trace:
        model()(**inputs, use_cache=False)
    kept = trace.stages[-1].kept[0]
    assert [int((kept < first).sum()), int((kept >= first).sum())] == [16, 2]


@torch.no_grad()
def test_a_scorer_is_shown_documents_as_the_rows_of_a_batch() -> None:
    class Watching(UniformScorer):
        def __call__(self, inputs: ScorerInputs) -> Tensor:
            seen.append((inputs.visual.sum(1).tolist(), inputs.num_keep.sum(1).tolist(), inputs.keys().shape[0]))
            return super().__call__(inputs)

    seen: list[tuple[list[int], list[int], int]] = []
    with PyramidDrop(layers=[2, 4], keep=[0.5, 0.25], score=Watching())(model()):
        model()(**packed(documents(), labels=True), use_cache=False)
    assert seen == [([16, 32, 0, 16, 32], [8, 16, 0, 8, 16], 5), ([8, 16, 0, 8, 16], [4, 8, 0, 4, 8], 5)]


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["pyramid", "per image"])
def test_what_attention_computes_shrinks_with_each_document(name: str, way: str) -> None:
    """Counted pair by pair: layers behind a drop are told bounds, or given a mask, of the rows that are left, and these
    hold the pairs that each document has alone. So packing and dropping save together, in the backward pass as well."""
    seen: list[int] = []

    def note(attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(count_pairs(kwargs["hidden_states"], kwargs))

    layers = text_model(model()).layers
    expected = [0] * len(layers)
    handles = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with running(way), METHODS[name](model()) as trace:
            for row in documents():
                model()(**alone(row, True), use_cache=False)
                expected = [pairs + n * (n + 1) // 2 for pairs, n in zip(expected, trace.lengths, strict=True)]
            seen.clear()
            loss = model()(**inputs_of(way, True), use_cache=False).loss
            packed_rows = list(trace.lengths)
    finally:
        for handle in handles:
            handle.remove()
    loss.backward()
    model().zero_grad()
    assert seen == expected
    assert seen[-1] < seen[2] < seen[0]
    assert packed_rows[-1] < packed_rows[0] == sum(len(row.ids) for row in documents())


def count_pairs(hidden: Tensor, kwargs: dict[str, Any]) -> int:
    """Pairs of a row that asks and one that it sees, as attention's arguments tell."""
    if kwargs.get("cu_seq_lens_q") is not None:
        assert int(kwargs["cu_seq_lens_q"][-1]) == hidden.shape[1]
        lengths = kwargs["cu_seq_lens_q"].diff().tolist()
        assert max(lengths) <= kwargs["max_length_q"]
    elif kwargs["attention_mask"] is None:  # of flash kernels, which read positions if there are any
        positions = kwargs["position_ids"]
        starts = [0] if positions is None else (positions[0] == 0).nonzero().flatten().tolist()
        lengths = torch.tensor([*starts, hidden.shape[1]]).diff().tolist()
    else:
        mask = kwargs["attention_mask"]
        assert mask.shape[-2:] == (hidden.shape[1], hidden.shape[1])
        return int((mask if mask.dtype == torch.bool else mask == 0).sum())
    return sum(length * (length + 1) // 2 for length in lengths)
