"""What most tests of the engine share: a rule as a method, and the engine's output held against the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyramiddrop import PyramidDrop
from reference import Result, Rule

HALVES = Rule([2, 4, 6], [0.5, 0.25, 0.125])
COMPACT = Rule([2, 4, 6], [0.5, 0.25, 0.125], positions="compact")
UNEVEN = Rule([1, 2, 7], [0.7, 0.3, 0.3])  # neighbouring layers, the first and the last possible one, an idle stage
LAST = Rule([2, 4, 6], [0.5, 0.25, 0.125], rank_layer="last")
EXIT = Rule([2, 4, 6], [0.5, 0.25, 0.0])  # from layer 6 on no visual token is left
KEEP_ALL = Rule([2, 4, 6], [1.0, 1.0, 1.0])

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def method_of(rule: Rule, **changes: Any) -> PyramidDrop:
    """The rule as the library's method."""
    return PyramidDrop(
        **(
            {
                "layers": list(rule.layers),
                "keep": list(rule.keep),
                "positions": rule.positions,
                "rank_layer": rule.rank_layer,
                "per_image": rule.per_image,
            }
            | changes
        )
    )


def kept_columns(trace: Any) -> list[list[list[int]]]:
    """The columns that were kept, drop by drop, sample by sample."""
    return [[columns.tolist() for columns in stage.kept] for stage in trace.stages]


def check_kept(trace: Any, expected: Result) -> None:
    """The kept sets are those of the reference."""
    for stage, kept in zip(trace.stages, expected.kept, strict=True):
        assert [columns.tolist() for columns in stage.kept] == [columns.tolist() for columns in kept]
        assert all(columns.dtype == torch.long and columns.device.type == "cpu" for columns in stage.kept)


def check_trace(trace: Any, expected: Result, rule: Rule) -> None:
    """Stages, kept sets and lengths are those of the reference."""
    assert [stage.layer for stage in trace.stages] == list(rule.layers)
    assert [stage.keep for stage in trace.stages] == list(rule.keep)
    check_kept(trace, expected)
    assert trace.lengths == expected.lengths


def check_logits(logits: Tensor, expected: Result) -> None:
    """Logits of full length are those of the reference wherever a row survived."""
    alive = expected.alive[-1]
    torch.testing.assert_close(logits[alive], expected.logits[alive], **CLOSE)


def generated(model: PreTrainedModel, inputs: dict[str, Any], steps: int, **options: Any) -> Any:
    """`generate` with all details; greedy unless the options say otherwise."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(**inputs, max_new_tokens=steps, **options)


def new_tokens(output: Any, inputs: dict[str, Any]) -> list[list[int]]:
    """The tokens after the prompt, row by row."""
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return output.sequences[:, start:].tolist()


def stacked(steps: Any) -> list[list[int]]:
    """The reference's tokens, row by row."""
    return torch.stack(list(steps), dim=1).tolist()


def same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within rounding of each parameter's largest; a parameter that nobody used may have zeros or nothing."""
    noise = 1e-5 * max(float(gradient.abs().max()) for gradient in expected.values())
    moved = {name for name, gradient in expected.items() if gradient.any()}
    assert moved <= ours.keys()
    for name, gradient in ours.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        tolerance = 1e-3 * float(wanted.abs().max()) + noise
        torch.testing.assert_close(gradient, wanted, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
