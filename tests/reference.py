"""The slow reference: every layer sees the full sequence, with eager attention; dropped tokens are only masked.

It grows from `pyramiddrop.naive`, whose layers, masks and positions it runs. More is here: the ranking reads the
probabilities that the layer's own attention module returns (there it is written out), turns of a conversation have
their own queries, the kept columns can be forced, and what enters each layer is noted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pyramiddrop import naive

IGNORED = -100


@dataclass(frozen=True)
class Rule:
    """What is dropped where: before layer `layers[k]`, the share `keep[k]` of the original visual tokens stays."""

    layers: Sequence[int]
    keep: Sequence[float]
    positions: str = "original"
    rank_layer: str = "next"
    per_image: bool = False


@dataclass
class Turn:
    """A stretch of columns whose visual tokens are ranked together, by this turn's own queries."""

    start: int
    stop: int
    queries: list[list[int]]  # per sample; none: the sample drops nothing


@dataclass
class Case:
    """One batch as the text model sees it. `protected`: visual columns that must stay whatever their score; `gone`:
    those that were dropped before the decoder."""

    embeds: Tensor  # (B, L, D)
    valid: Tensor  # (B, L) bool
    visual: Tensor  # (B, L) bool
    turns: list[Turn]
    images: Tensor | None = None  # (B, L) the number of the image that a visual column belongs to
    protected: Tensor | None = None  # (B, L) bool
    gone: Tensor | None = None  # (B, L) bool


@dataclass
class Result:
    """Logits at all columns (meaningless where a row was dropped), and who was alive in which layer."""

    logits: Tensor
    alive: list[Tensor] = field(default_factory=list)  # per layer: (B, L) bool
    kept: list[list[Tensor]] = field(default_factory=list)  # per stage, per sample: sorted visual columns
    hidden: list[Tensor] = field(default_factory=list)  # what enters each layer
    scores: list[list[Tensor]] = field(default_factory=list)  # per stage, per sample: (L,), the last turn's
    loss: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """The longest sample in every layer."""
        return [int(alive.sum(dim=1).max()) for alive in self.alive]


def run(model: PreTrainedModel, rule: Rule, case: Case, forced: list[list[Tensor]] | None = None) -> Result:
    """The text model layer by layer. `forced` gives the kept columns per stage and sample instead of a ranking."""
    text = model.model.language_model
    alive = case.valid.clone() if case.gone is None else case.valid & ~case.gone
    hidden = case.embeds
    result = Result(logits=hidden)
    attention = torch.empty(0)  # of the layer before
    with eager(text):
        for number, layer in enumerate(text.layers):
            if number in rule.layers:
                stage = list(rule.layers).index(number)
                for turn in case.turns:
                    if forced is not None:
                        alive = _only(alive, case.visual, forced[stage])
                        continue
                    if rule.rank_layer == "next":
                        with torch.no_grad():
                            attention, _ = run_layer(text, layer, hidden, alive, case.valid, rule.positions)
                    scores = mean_attention(attention, turn.queries)
                    result.scores.append(scores)
                    alive = drop(alive, scores, rule.keep[stage], rule.per_image, case, turn)
                result.kept.append([(row & eye).nonzero()[:, 0] for row, eye in zip(alive, case.visual, strict=True)])
            result.alive.append(alive.clone())
            result.hidden.append(hidden)
            attention, hidden = run_layer(text, layer, hidden, alive, case.valid, rule.positions)
    result.logits = model.lm_head(text.norm(hidden))
    return result


def run_layer(
    text: Any, layer: Any, hidden: Tensor, alive: Tensor, valid: Tensor, positions: str
) -> tuple[Tensor, Tensor]:
    """One decoder layer in which only living keys are seen: its own attention (B, H, L, L), and what comes out."""
    seen_by_module: list[Tensor] = []
    handle = layer.self_attn.register_forward_hook(lambda module, args, output: seen_by_module.append(output[1]))
    try:
        output = naive.run_layer(text, layer, hidden, alive, naive.position_ids(alive, valid, positions))
    finally:
        handle.remove()
    return seen_by_module[0], output


def mean_attention(attention: Tensor, queries: list[list[int]]) -> list[Tensor]:
    """Per sample (L,): the mean over heads, then over the sample's queries. No query: an empty tensor."""
    scores = []
    for sample, rows in enumerate(queries):
        heads = attention[sample].detach().float().mean(dim=0)  # (L, L)
        scores.append(heads[rows].mean(dim=0) if rows else torch.empty(0))
    return scores


def drop(alive: Tensor, scores: list[Tensor], keep: float, per_image: bool, case: Case, turn: Turn) -> Tensor:
    """`alive` after the turn's visual tokens were ranked, sample by sample and, if asked for, image by image."""
    alive = alive.clone()
    for sample, queries in enumerate(turn.queries):
        columns = [c for c in case.visual[sample].nonzero()[:, 0].tolist() if turn.start <= c < turn.stop]
        if not queries or not columns:
            continue
        protected = {c for c in columns if c in queries or (case.protected is not None and case.protected[sample, c])}
        groups = {0: columns}
        if per_image:
            assert case.images is not None
            groups = {}
            for c in columns:
                groups.setdefault(int(case.images[sample, c]), []).append(c)
        for group in groups.values():
            living = [c for c in group if alive[sample, c]]
            kept = choose(living, scores[sample], num_keep(len(group), keep), protected)
            for c in living:
                alive[sample, c] = c in kept
    return alive


def num_keep(original: int, keep: float) -> int:
    """The floor of the float product, at least 1 of a keep ratio that is not 0."""
    return max(1, math.floor(original * keep)) if keep else 0


def choose(living: list[int], scores: Tensor, count: int, protected: set[int]) -> list[int]:
    """The `count` best columns: protected ones first (all of them), then by score, ties by lowest column."""
    count = max(count, len(protected & set(living)))
    ranked = sorted(living, key=lambda c: (c not in protected, -float(scores[c]), c))
    return sorted(ranked[:count])


def _only(alive: Tensor, visual: Tensor, kept: list[Tensor]) -> Tensor:
    alive = alive & ~visual
    for sample, columns in enumerate(kept):
        alive[sample, columns] = True
    return alive


@contextmanager
def eager(text: Any) -> Iterator[None]:
    """The text model's attention modules compute and return their probabilities."""
    before = text.config._attn_implementation
    text.config._attn_implementation = "eager"
    try:
        yield
    finally:
        text.config._attn_implementation = before


# --- From the inputs of the top model -------------------------------------------------------------------------------


class _StopError(Exception):
    """The embeddings are known: nothing more of the model is needed."""


def embed(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """What the top model feeds its text model: token embeddings with the images written in."""
    got: list[Tensor] = []

    def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        got.append(kwargs["inputs_embeds"])
        raise _StopError

    handle = model.model.language_model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs)
    except _StopError:
        pass
    finally:
        handle.remove()
    return got[0]


def image_numbers(visual: Tensor) -> Tensor:
    """(B, L): the images of a sample counted 1, 2, ... by contiguous runs of visual columns; 0 elsewhere."""
    starts = visual & ~F.pad(visual, (1, 0))[:, :-1]
    return starts.long().cumsum(dim=1) * visual


def last_columns(valid: Tensor) -> list[list[int]]:
    """Per sample, the last column that is not padding."""
    return [[int(row.nonzero()[-1])] for row in valid]


def inference_case(model: PreTrainedModel, inputs: dict[str, Any]) -> Case:
    """A prompt: the query is its last token."""
    ids = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    visual = (ids == model.config.image_token_id) & valid
    turns = [Turn(0, ids.shape[1], last_columns(valid))]
    return Case(embed(model, **inputs), valid, visual, turns, image_numbers(visual))


def prefill(model: PreTrainedModel, rule: Rule, inputs: dict[str, Any], forced: Any = None) -> Result:
    """The prompt's forward pass."""
    with torch.no_grad():
        return run(model, rule, inference_case(model, inputs), forced)


# --- Training -------------------------------------------------------------------------------------------------------


def answer_queries(labels: Tensor) -> list[list[int]]:
    """Per sample, the columns just before an answer span."""
    return [[p for p in range(len(row) - 1) if row[p + 1] != IGNORED and row[p] == IGNORED] for row in labels.tolist()]


def predictors(labels: Tensor) -> Tensor:
    """(B, L): columns whose next label is supervised."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1))


def training_case(model: PreTrainedModel, inputs: dict[str, Any], queries: list[list[int]] | None = None) -> Case:
    """A training batch with labels. `queries` overrides who asks."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    case = inference_case(model, inputs)
    labels = answers(case, labels)
    asking = answer_queries(labels) if queries is None else queries
    # An answer at the start of a left padded row has padding before it, which asks nobody.
    case.turns[0].queries = [[c for c in row if case.valid[n, c]] for n, row in enumerate(asking)]
    case.protected = case.visual & predictors(labels)
    return case


def train(
    model: PreTrainedModel,
    rule: Rule,
    inputs: dict[str, Any],
    queries: list[list[int]] | None = None,
    forced: Any = None,
) -> Result:
    """The training forward pass, with its loss: the mean over all supervised tokens of the batch."""
    case = training_case(model, inputs, queries)
    result = run(model, rule, case, forced)
    result.loss = next_token_loss(result.logits, answers(case, inputs["labels"]))
    return result


def answers(case: Case, labels: Tensor) -> Tensor:
    """The labels that count: not those of visual tokens."""
    return labels.masked_fill(case.visual, IGNORED)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each supervised token, given what stands before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


# --- Generation -----------------------------------------------------------------------------------------------------


@dataclass
class Talk:
    """A conversation so far, kept as one growing sequence."""

    case: Case
    tokens: list[Tensor] = field(default_factory=list)  # (B,) each: everything that was generated
    logits: list[Tensor] = field(default_factory=list)  # (B, V) each: what they were chosen from
    first: Result | None = None  # the last prompt's forward pass

    def append(self, embeds: Tensor, visual: Tensor | None = None) -> None:
        """Valid columns at the end."""
        more = torch.ones(embeds.shape[:2], dtype=torch.bool)
        self.case.embeds = torch.cat([self.case.embeds, embeds], dim=1)
        self.case.valid = torch.cat([self.case.valid, more], dim=1)
        self.case.visual = torch.cat([self.case.visual, ~more if visual is None else visual], dim=1)
        self.case.images = image_numbers(self.case.visual)
        if self.case.gone is not None:
            self.case.gone = torch.cat([self.case.gone, ~more], dim=1)


def greedy(model: PreTrainedModel, rule: Rule, inputs: dict[str, Any], steps: int) -> Talk:
    """Greedy tokens after a (left padded) prompt; the whole sequence is computed anew for each."""
    with torch.no_grad():
        return answer(model, rule, Talk(inference_case(model, inputs)), steps)


def further_turn(model: PreTrainedModel, rule: Rule, talk: Talk, inputs: dict[str, Any], steps: int) -> Talk:
    """The next prompt of the same conversation: its own visual tokens are ranked by its own last token."""
    with torch.no_grad():
        embeds = embed(model, **inputs)
        start = talk.case.embeds.shape[1]
        talk.append(embeds, inputs["input_ids"] == model.config.image_token_id)
        stop = talk.case.embeds.shape[1]
        talk.case.turns.append(Turn(start, stop, [[stop - 1]] * len(embeds)))
        return answer(model, rule, talk, steps)


def answer(model: PreTrainedModel, rule: Rule, talk: Talk, steps: int) -> Talk:
    """`steps` greedy tokens at the end of the talk."""
    for step in range(steps):
        result = run(model, rule, talk.case)
        if step == 0:
            talk.first = result
        logits = result.logits[:, -1]
        talk.logits.append(logits)
        talk.tokens.append(logits.argmax(dim=-1))
        talk.append(model.get_input_embeddings()(talk.tokens[-1])[:, None])
    return talk
