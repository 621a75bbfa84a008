"""The slow reference for text models that are not of attention alone: one sample, no cache, rows really taken out.

A convolution or a recurrent state hands a token on to the next ones whatever the mask says; there a dropped token must
be absent. Everything else is as in `masked`: the same ranking, the same choice, original positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from masked_oracle import Call, Oracle, Prompt, attached, bound, probabilities
from pyramiddrop.hf.versions import cache_of
from reference import Rule


@dataclass
class Remover(Oracle):
    """Hooks that take rows out; `prompts` are the turns of the conversation that this one sequence holds."""

    prompts: Sequence[Prompt] = field(default_factory=list)

    def begin(self, text: nn.Module, args: tuple[Any, ...], kwargs: Call) -> None:
        """Before the text model: everything is there, and everything is ranked."""
        assert cache_of(bound(text, args, kwargs)) is None, "rows are taken out without a cache"
        self.prompt = self.prompts[0]
        super().begin(text, args, kwargs)
        self.ranking = True

    def enter(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call]:
        """Before a decoder layer: end a stage where one ends, and hand on what belongs to the rows that are left."""
        call = bound(layer, args, kwargs)
        hidden = call.pop(next(iter(inspect.signature(layer.forward).parameters)))
        stage = sum(first <= number for first in self.rule.layers)
        if number in self.rule.layers:
            before = self.alive[stage - 1][0]
            attention = self.before
            if self.rule.rank_layer == "next":
                attention = probabilities(layer, hidden, taken(call, before))
            for turn in self.prompts:
                self.prompt = turn
                self.drop(stage, spread(attention, before))
            assert bool((self.alive[stage] == self.alive[stage][0]).all()), "rows are beams of one sample"
            self.kept = [*self.kept[: stage - 1], self.kept[-1]]  # the last turn's
            hidden = hidden[:, self.alive[stage][0][before]]
        call = taken(call, self.alive[stage][0])
        if self.rule.rank_layer == "last" and number + 1 in self.rule.layers:
            self.before = probabilities(layer, hidden, call)
        return (hidden,), call

    def leave(self, text: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind the text model: zeros where rows were taken out."""
        rows = output.last_hidden_state
        full = rows.new_zeros(len(rows), self.survives.shape[1], rows.shape[2])
        output.last_hidden_state = full.index_copy(1, self.survives[0].nonzero()[:, 0], rows)
        return output


@contextmanager
def removed(model: PreTrainedModel, rule: Rule, *prompts: Prompt) -> Iterator[Remover]:
    """For the time of a `with` block the model's text model computes only on what the rule leaves."""
    with attached(model, Remover(rule, prompts[0], prompts=prompts)) as oracle:
        yield oracle


def taken(call: Call, alive: Tensor) -> Call:
    """The arguments of a layer for the rows that live."""
    return {name: take(value, alive, name == "attention_mask") for name, value in call.items()}


def take(value: Any, alive: Tensor, mask: bool = False) -> Any:
    """A tensor along the dimension that counts tokens: the second, or the last (positions of several axes)."""
    if isinstance(value, tuple):
        return tuple(take(part, alive) for part in value)
    if not isinstance(value, Tensor):
        return value
    if mask and value.dim() == 4:
        return value[:, :, alive][..., alive]
    if value.dim() >= 2 and value.shape[1] == len(alive):
        return value[:, alive]
    return value[..., alive] if value.dim() and value.shape[-1] == len(alive) else value


def spread(attention: Tensor, alive: Tensor) -> Tensor:
    """(B, H, L, L) of the probabilities (B, H, N, N) among the N living of L columns."""
    columns = alive.nonzero()[:, 0]
    full = attention.new_zeros(*attention.shape[:2], len(alive), len(alive))
    full[:, :, columns[:, None], columns] = attention
    return full
