"""The FlashAttention path on the CPU: its 2-D masks and its packed-sequence check, with an exact stand-in kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyramiddrop import PyramidDrop
from tiny import make_batch, text_model, tiny_model

METHOD = PyramidDrop(layers=[2, 4, 6], keep=[0.5, 0.25, 0.125])


def stand_in(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What flash kernels compute from a 2-D mask over the keys: causal, aligned to the lower right."""
    assert mask is None or mask.dim() == 2
    position_ids = kwargs.get("position_ids")
    if mask is None and position_ids is not None:
        assert not _is_packed_sequence(position_ids, len(query)), "gaps between positions read as packed sequences"
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows, columns = query.shape[2], key.shape[2]
    visible = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)[None, None]
    if mask is not None:
        visible = visible & mask.bool()[:, None, None, -columns:]
    logits = (query @ key.transpose(-1, -2) * scaling).masked_fill(~visible, -1e30)
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@contextmanager
def flash(model: PreTrainedModel) -> Iterator[None]:
    """Let the text model of `model` run "flash_attention_2", computed by the stand-in."""
    config = text_model(model).config
    before = config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = stand_in
    config._attn_implementation_internal = "flash_attention_2"
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = original


SPECS = {
    "one": [[3, "image", 6]],
    "padded": [[3, "image", 6], [12]],
    "uneven without padding": [[3, "image", 6], [25]],
    "ragged": [[3, "image", 6], [2, "image", 2, "image", 5]],
}


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_flash_masks_say_the_same_as_sdpa(specs: list[list[Any]], positions: str) -> None:
    model = tiny_model("llava-gqa", "sdpa")
    inputs = make_batch(model, specs)
    method = PyramidDrop(layers=METHOD.layers, keep=METHOD.keep, positions=positions)
    options = {"max_new_tokens": 5, "do_sample": False}
    with method(model) as trace:
        wanted = model.generate(**inputs, **options)
        kept = [[columns.tolist() for columns in stage.kept] for stage in trace.stages]
        with flash(model):
            got = model.generate(**inputs, **options)
            assert [[columns.tolist() for columns in stage.kept] for stage in trace.stages] == kept
    assert got.tolist() == wanted.tolist()
