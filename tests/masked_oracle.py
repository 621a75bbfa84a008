"""The universal slow reference: any model runs at full length, eagerly, and dropped tokens are only masked.

It knows nothing of a family but where its decoder layers are: hooks on them mask the columns that a stage has dropped
in the layer's own full-length mask, so that windows, chunks, bidirectional images and positions stay those of the
untouched model. A KV cache, where `generate` makes one, holds the full length too. Ranking reads the probabilities
that the layer's own attention module returns. (`reference` is the older one: LLaVA alone, and compact positions.)
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyramiddrop.hf.versions import cache_argument, cache_of
from reference import Rule, choose, num_keep

Call = dict[str, Any]


@dataclass
class Prompt:
    """The columns of one call whose visual tokens are ranked; all columns count from the call's first."""

    visual: Tensor  # (B, L) bool
    queries: Sequence[Sequence[int]]  # per sample, the columns that ask; none: the sample drops nothing
    groups: Tensor  # (B, L) the number of the image or video that a visual column belongs to
    protected: Tensor  # (B, L) bool, columns that stay whatever their score
    start: int = 0  # columns that a cache holds before this call

    def later(self, start: int, length: int) -> Prompt:
        """The same as the end of a sequence of `length` columns, of which a cache holds the first `start`."""
        more = length - start - self.visual.shape[1]
        visual, groups, protected = (F.pad(t, (more, 0)) for t in (self.visual, self.groups, self.protected))
        return Prompt(visual, [[query + more for query in row] for row in self.queries], groups, protected, start)


@dataclass
class Oracle:
    """What the hooks know and tell.

    Attributes:
        prompt: what the next forward at `prompt.start` ranks; a test may set it anew for a further turn.
        alive: per stage (the first drops nothing) the columns so far that its layers see, (B, columns).
        kept: per stage that drops, per row (a sample has one for each beam): the visual columns that stay.
    """

    rule: Rule
    prompt: Prompt
    alive: list[Tensor] = field(default_factory=list)
    kept: list[list[Tensor]] = field(default_factory=list)
    ranking: bool = False
    before: Tensor = field(default_factory=lambda: torch.empty(0))  # probabilities of the layer before

    @property
    def survives(self) -> Tensor:
        """(B, columns) which columns no stage has dropped."""
        return self.alive[-1]

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def begin(self, text: nn.Module, args: tuple[Any, ...], kwargs: Call) -> None:
        """Before the text model: columns so far, and whether this forward ranks."""
        call = bound(text, args, kwargs)
        tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
        cache = cache_of(call)
        past = 0 if cache is None else cache.get_seq_length()
        new = torch.ones(tokens.shape[:2], dtype=torch.bool)
        earlier = self.alive if past else [new[:, :0]] * (len(self.rule.layers) + 1)
        self.alive = [torch.cat([seen, new], dim=1) for seen in earlier]
        self.ranking = past == self.prompt.start
        if self.ranking:
            self.kept = []

    def enter(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call]:
        """Before a decoder layer: end a stage where one ends, and mask what is dropped."""
        call = bound(layer, args, kwargs)
        hidden = call.pop(next(iter(inspect.signature(layer.forward).parameters)))
        stage = sum(first <= number for first in self.rule.layers)
        if self.ranking and number in self.rule.layers:
            self.drop(stage, self.attention(stage, layer, hidden, call))
        call["attention_mask"] = hide(call.get("attention_mask"), self.alive[stage], hidden)
        if self.rule.rank_layer == "last" and self.ranking and number + 1 in self.rule.layers:
            self.before = probabilities(layer, hidden, call)
        return (hidden,), call

    def leave(self, text: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind the text model: all rows are there."""
        return output

    # ---- a stage's end ---------------------------------------------------------------------------------------------

    def attention(self, stage: int, layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """(B, H, rows, columns) of the layer that ranks for the end of `stage`."""
        if self.rule.rank_layer == "last":
            return self.before
        start = self.prompt.start  # what an earlier turn dropped before this layer is gone; its own columns all live
        seen = torch.cat([self.alive[stage][:, :start], self.alive[stage - 1][:, start:]], dim=1)
        return probabilities(layer, hidden, call | {"attention_mask": hide(call.get("attention_mask"), seen, hidden)})

    def drop(self, stage: int, attention: Tensor) -> None:
        """Choose among the prompt's columns that still live, sample by sample and group by group."""
        prompt, alive = self.prompt, self.alive[stage].clone()
        alive[:, prompt.start :] = self.alive[stage - 1][:, prompt.start :]
        beams = len(alive) // len(prompt.visual)
        for row in range(len(alive)):
            sample, mine = row // beams, alive[row, prompt.start :]  # a view
            if prompt.queries[sample]:
                scores = received(attention[row], prompt.queries[sample], len(mine))
                for group in self.groups(sample):
                    self.choose_from(group, mine, scores, self.rule.keep[stage - 1], sample)
        self.alive[stage] = alive
        own = alive[:, prompt.start : prompt.start + prompt.visual.shape[1]]
        visual = prompt.visual.repeat_interleave(beams, dim=0)
        self.kept.append([(row & eye).nonzero()[:, 0] + prompt.start for row, eye in zip(own, visual, strict=True)])

    def groups(self, sample: int) -> list[list[int]]:
        """The visual columns of a sample that compete with each other."""
        columns = self.prompt.visual[sample].nonzero()[:, 0].tolist()
        if not self.rule.per_image:
            return [columns] if columns else []
        numbers = self.prompt.groups[sample]
        return [[c for c in columns if numbers[c] == n] for n in sorted({int(numbers[c]) for c in columns})]

    def choose_from(self, group: list[int], alive: Tensor, scores: Tensor, keep: float, sample: int) -> None:
        """Write into `alive` who of a group stays."""
        living = [column for column in group if alive[column]]
        protected = {column for column in group if self.prompt.protected[sample, column]}
        alive[living] = False
        alive[choose(living, scores, num_keep(len(group), keep), protected)] = True


AnyOracle = TypeVar("AnyOracle", bound=Oracle)


@contextmanager
def masked(model: PreTrainedModel, rule: Rule, prompt: Prompt) -> Iterator[Oracle]:
    """For the time of a `with` block the model's text model runs eagerly and sees only what the rule leaves."""
    with attached(model, Oracle(rule, prompt)) as oracle:
        yield oracle


@contextmanager
def attached(model: PreTrainedModel, oracle: AnyOracle) -> Iterator[AnyOracle]:
    """An oracle's hooks on the text model and its layers, under eager attention."""
    text = text_model(model)
    handles = [
        text.register_forward_pre_hook(oracle.begin, with_kwargs=True),
        text.register_forward_hook(oracle.leave),
    ]
    for number, layer in enumerate(text.layers):
        handles.append(layer.register_forward_pre_hook(partial(oracle.enter, number), with_kwargs=True))
    try:
        with eager(model):
            yield oracle
    finally:
        for handle in handles:
            handle.remove()


# --- The parts of a model -------------------------------------------------------------------------------------------


def text_model(model: PreTrainedModel) -> Any:
    """The decoder stack: the module with layers and token embeddings that runs the text part of the configuration."""
    stacks = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "embed_tokens")
    ]
    config = model.config.get_text_config(decoder=True)
    return next((module for module in stacks if module.config is config), stacks[0])


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """The text model, and whoever makes masks for it, takes it that attention is eager; vision towers stay as is."""
    text = text_model(model)
    around = [module for module in model.modules() if any(part is text for part in module.modules())]
    configs = [module.config for module in around if hasattr(module, "config")]
    configs = [*configs, model.config.get_text_config(decoder=True)]
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = "eager"  # (the public setter also sets it for the vision tower)
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> Call:
    """All arguments of a call by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


# --- Attention ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def probabilities(layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """(B, H, rows, columns) attention in a layer that runs aside: no dropout, nothing left in caches or in training."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].dim() == 4:
            found.append(output[1])

    training = [module for module in layer.modules() if module.training]
    handles = [module.register_forward_hook(note) for module in layer.modules() if module is not layer]
    try:
        for module in training:
            module.training = False
        with torch.random.fork_rng(devices=[]):
            layer.forward(hidden, **aside(call))
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    assert len(found) == 1, f"{type(layer).__name__} returned {len(found)} attention matrices"
    return found[0]


def aside(call: Call) -> Call:
    """The same call on copies of what a layer writes to."""
    own = cache_argument(copy.deepcopy(cache_of(call)))
    if call.get("shared_kv_states") is not None:
        own["shared_kv_states"] = copy.copy(call["shared_kv_states"])
    return call | own


def received(attention: Tensor, queries: Sequence[int], length: int) -> Tensor:
    """(length,) what the last `length` columns receive of one sample's (H, rows, columns): mean of heads, of queries.

    Some models compute only the last rows where nobody reads the others.
    """
    heads = attention.float().mean(dim=0)
    rows = [query - (length - len(heads)) for query in queries]
    assert min(rows) >= 0
    scores = heads[rows].mean(dim=0)
    return F.pad(scores, (length, 0))[-length:]


def hide(mask: Any, alive: Tensor, hidden: Tensor) -> Any:
    """A layer's own additive mask (B or 1, 1, rows, columns) without the columns that do not live.

    Where a windowed cache holds fewer columns, they are the last ones.
    """
    if bool(alive.all()):
        return mask
    assert isinstance(mask, Tensor), f"an eager layer has {type(mask).__name__} for a mask"
    assert mask.dim() == 4, f"a layer whose mask is {tuple(mask.shape)} cannot be told what was dropped: see `removed`"
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    lowest = max(torch.finfo(mask.dtype).min, torch.finfo(torch.float32).min)  # softmax runs in fp32
    mask = mask.clamp(min=lowest).expand(len(alive), -1, -1, -1)
    return mask.masked_fill(~alive[:, None, None, -mask.shape[-1] :], lowest)
