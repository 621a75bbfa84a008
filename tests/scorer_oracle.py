"""The slow oracle of the scorers: each rule again in plain loops, at full length with dropped tokens masked.

It takes from `reference` what enters each layer and who is alive there, and shares no code with `pyramiddrop.scoring`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import reference
from checks import check_logits, check_trace
from reference import Case, Result, Rule


@dataclass
class Look:
    """One stage end of one sample. `columns` are the visual tokens that compete, `images` the image of each."""

    model: Any
    case: Case
    result: Result
    layer: int
    sample: int
    columns: list[int]
    images: list[int]
    counts: dict[int, int]  # of each image, how many stay

    @property
    def text(self) -> Any:
        return self.model.model.language_model

    @property
    def query(self) -> int:
        return self.case.turns[0].queries[self.sample][0]

    def token_index(self, column: int) -> int:
        """The number of a visual token among the original ones."""
        return int(self.case.visual[self.sample, :column].sum())

    def hidden(self, layer: int) -> Tensor:
        """(L, D) what `layer` receives."""
        return self.result.hidden[layer][self.sample]

    def weights(self) -> Tensor:
        """(H, L, L) the ranking layer's own attention."""
        alive = self.result.alive[self.layer - 1]
        hidden = self.result.hidden[self.layer]
        with reference.eager(self.text):
            layer = self.text.layers[self.layer]
            weights, _ = reference.run_layer(self.text, layer, hidden, alive, self.case.valid, "original")
        return weights[self.sample]


@torch.no_grad()
def looks(model: Any, method: Any, inputs: dict[str, Tensor]) -> list[tuple[Look, Tensor, Tensor]]:
    """For each stage and sample: what the oracle sees, the scores and the kept columns that the trace tells."""
    with method(model) as trace:
        output = model(**inputs)
    rule = Rule(method.layers, method.keep, per_image=method.per_image)
    case = reference.inference_case(model, inputs)
    result = reference.run(model, rule, case, forced=[stage.kept for stage in trace.stages])
    check_trace(trace, result, rule)
    check_logits(output.logits, result)
    found = []
    for stage in trace.stages:
        if stage.scores is None:  # nothing was to be dropped
            continue
        for sample, (columns, scores) in enumerate(zip(trace.visual_columns, stage.scores, strict=True)):
            there = [int(c) for c in columns if result.alive[stage.layer - 1][sample, c]]
            images = [int(case.images[sample, c]) if method.per_image else 0 for c in there]
            every = [int(case.images[sample, c]) if method.per_image else 0 for c in columns]
            counts = {image: reference.num_keep(every.count(image), stage.keep) for image in set(every)}
            look = Look(model, case, result, stage.layer, sample, there, images, counts)
            found.append((look, scores[~scores.isnan()], stage.kept[sample]))
    return found


def attention(look: Look) -> list[float]:
    return [float(look.weights()[:, look.query, c].mean()) for c in look.columns]


def instruction(look: Look) -> list[float]:
    visual = look.case.visual[look.sample]
    last = max(c for c in range(len(visual)) if visual[c])
    rows = [c for c in range(last + 1, look.query + 1) if look.case.valid[look.sample, c]]
    weights = look.weights()
    return [float(np.mean([float(weights[:, row, c].mean()) for row in rows])) for c in look.columns]


def rope_free(look: Look) -> list[float]:
    module = look.text.layers[look.layer].self_attn
    normed = look.text.layers[look.layer].input_layernorm(look.hidden(look.layer))
    width = module.head_dim
    queries, keys = (project(normed).view(len(normed), -1, width) for project in (module.q_proj, module.k_proj))
    if hasattr(module, "q_norm"):
        queries, keys = module.q_norm(queries), module.k_norm(keys)
    alive = look.result.alive[look.layer - 1][look.sample]
    scaled = look.text.rotary_emb.attention_scaling**2  # YaRN lengthens queries and keys by it
    total = torch.zeros(len(normed))
    for head in range(queries.shape[1]):
        shared = head // (queries.shape[1] // keys.shape[1])
        logits = torch.tensor(
            [
                float(queries[look.query, head] @ keys[c, shared]) * scaled / width**0.5
                if alive[c] and c <= look.query
                else float("-inf")
                for c in range(len(normed))
            ]
        )
        total += logits.softmax(0)
    return [float(total[c]) / queries.shape[1] for c in look.columns]


def debiased(look: Look) -> list[float]:
    logarithms = np.log(attention(look))
    numbers = np.array([look.token_index(c) for c in look.columns], dtype=float)
    scores = np.zeros(len(numbers))
    for image in set(look.images):
        mine = np.array(look.images) == image
        fit = np.polyfit(numbers[mine], logarithms[mine], 1) if mine.sum() > 3 else [logarithms[mine].mean()]
        scores[mine] = logarithms[mine] - np.polyval(fit, numbers[mine])
    return list(scores)


def top_heads(look: Look) -> list[float]:
    weights = look.weights()[:, look.query]
    looking = [float(sum(head[c] for c in look.columns)) for head in weights]
    best = sorted(range(len(weights)), key=lambda head: -looking[head])[: max(1, len(weights) // 4)]
    return [float(np.mean([float(weights[head, c]) for head in best])) for c in look.columns]


def key_norm(look: Look) -> list[float]:
    module = look.text.layers[look.layer].self_attn
    keys = module.k_proj(look.text.layers[look.layer].input_layernorm(look.hidden(look.layer)))
    keys = keys.view(len(keys), -1, module.head_dim)
    if hasattr(module, "k_norm"):
        keys = module.k_norm(keys)
    return [-float(np.mean([float((head**2).sum() ** 0.5) for head in keys[c]])) for c in look.columns]


def variation(look: Look) -> list[float]:
    after, before = look.hidden(look.layer), look.hidden(look.layer - 1)
    return [float(((after[c] - before[c]) ** 2).sum() ** 0.5) for c in look.columns]


def diversity(look: Look) -> set[int]:
    """The columns that stay: this rule is a choice and no score."""
    hidden = look.hidden(look.layer)
    unit = hidden / hidden.norm(dim=-1, keepdim=True)
    chosen: set[int] = set()
    for image, count in look.counts.items():
        mine = [c for c, its in zip(look.columns, look.images, strict=True) if its == image]
        mean = sum(unit[c] for c in mine)
        mean = mean / mean.norm()
        picked = [min(mine, key=lambda c: float(unit[c] @ mean))]
        while len(picked) < count:
            rest = [c for c in mine if c not in picked]
            picked.append(max(rest, key=lambda c: min(1 - float(unit[c] @ unit[p]) for p in picked)))
        chosen |= set(picked)
    return chosen


SCORES = {
    "attention": attention,
    "instruction": instruction,
    "rope_free": rope_free,
    "debiased": debiased,
    "top_heads": top_heads,
    "key_norm": key_norm,
    "variation": variation,
}
