"""No family's prefill waits for the device; see `test_host_waits`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from pyramiddrop import PyramidDrop
from pyramiddrop.hf import query_key
from pyramiddrop.hf.model_info import inspect_model
from pyramiddrop.hf.versions import cache_argument
from test_cost_zoo import SUPPORTED, TOO_LONG
from zoo import MEMBERS

#: What cannot run so -> why.
CANNOT = {
    **dict.fromkeys(TOO_LONG, "its prompts may not be longer than 15 tokens"),
    "gemma4-edge": "the untouched model asks for values: which tokens are in its table",
    "idefics2-sliding": "no layer sees the whole prompt",
    "step3p7": "the untouched model asks for values: which experts are hit",
}
ROWS = 40


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in CANNOT])
def test_a_prefill_and_a_step_ask_for_no_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_key, "_agree", lambda *given: True)  # asked once, and waited for
    text: Any = inspect_model(MEMBERS[name].build(0)).text.to("meta", torch.bfloat16)
    visual = torch.zeros(1, ROWS, dtype=torch.bool)
    visual[:, 5:30] = True
    cache = DynamicCache(config=text.config)
    with torch.no_grad(), PyramidDrop(stages=2)(text, visual_mask=visual) as trace:
        for rows in (ROWS, 1):
            hidden = torch.empty(1, rows, text.config.hidden_size, dtype=torch.bfloat16, device="meta")
            output = text(inputs_embeds=hidden, **cache_argument(cache))
            assert output.last_hidden_state.shape[1] == rows
    assert trace.lengths[-1] == ROWS - 25 + 12
