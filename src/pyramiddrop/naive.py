"""PyramidDrop in one short file: slow, obvious, and the specification of this library.

Every layer computes the full sequence. A dropped token is masked, not removed: from the layer of its drop on, no other
token attends to it. The numbers are the same, without gathering or caching. The tests compare the fast path with this
file, and this file with numbers of the official code.

The rules (arXiv 2410.17247; where the paper's text and its official code differ, the code's, unless noted):

* Drop: before a decoder layer, floor(N * keep) of the N ORIGINAL visual tokens are kept, at least 1; with a last `keep`
  of 0, none. A float product: 0.29 of 100 tokens is 28. The paper keeps 0.5, 0.25, 0.125 before layers 8, 16, 24.
* Score: the attention that a visual token receives from the query token; softmax over ALL keys that the query sees, in
  fp32, mean over the heads, no gradient. It is the attention of the layer before which tokens are dropped, on hidden
  states from before the drop (`rank_layer="next"`), or of the layer before that one (`"last"`, FastV's rule).
* Query: the prompt's last token, also while further tokens are generated. In training, every token just before an
  answer (a span of labels), weighted equally. A sample without a query or without an image drops nothing.
* Selection: the highest scores are kept; of equal scores, the lower column. The order of the sequence is kept. Text is
  never dropped, and neither is a query token or a token that predicts a label.
* Several images: they share one count, or each has its own. (The official code ranks the first image alone.)
* Positions: each token keeps its position id (`"original"`), or the remaining ones are renumbered 0..n-1 (`"compact"`,
  the official code's rule, which is measurably worse and therefore not the default).

`text` is a Llama-like text model of Transformers, such as `model.model.language_model` of LLaVA, with "eager" or "sdpa"
attention. Shapes: B samples, L tokens, D hidden size, H heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def forward(
    text: Any,
    embeds: Tensor,
    valid: Tensor,
    visual: Tensor,
    layers: Sequence[int],
    keep: Sequence[float],
    query: Tensor | None = None,
    labels: Tensor | None = None,
    positions: str = "original",
    rank_layer: str = "next",
) -> tuple[Tensor, list[Tensor]]:
    """Run the decoder over a prompt, or over a training batch with `labels`; keep `keep[k]` before `layers[k]`.

    Args:
        embeds: (B, L, D), token embeddings with the image features written in.
        valid: (B, L) bool, False at padding.
        visual: (B, L) bool, the visual tokens; or integers: 0 at text, one number for each image with its own count.
        query: (B, L) bool, the query tokens; None: those of the rules above.
        labels: (B, L) long, -100 where nothing is supervised.

    Returns:
        (B, L, D) the input of the language model's head, meaningless at dropped tokens; and for each drop (B, L) bool,
        the kept visual tokens.
    """
    predicts = torch.zeros_like(valid) if labels is None else pad(labels[:, 1:] != -100, (0, 1))
    if query is None:
        query = last_token(valid) if labels is None else predicts & (labels == -100) & valid
    visual = visual * valid
    alive, hidden, entered, kept = valid, embeds, embeds, list[Tensor]()
    for number, layer in enumerate(text.layers):
        if number in layers:
            ranks = (layer, hidden) if rank_layer == "next" else (text.layers[number - 1], entered)
            scores = attention_received(text, *ranks, alive, position_ids(alive, valid, positions), query)
            alive = drop(alive, scores, visual, query, predicts, keep[list(layers).index(number)])
            kept.append(alive & (visual > 0))
        entered, hidden = hidden, run_layer(text, layer, hidden, alive, position_ids(alive, valid, positions))
    return text.norm(hidden), kept


def run_layer(text: Any, layer: Any, hidden: Tensor, alive: Tensor, ids: Tensor) -> Tensor:
    """Run one decoder layer at position `ids` (B, L); only `alive` tokens (B, L) are attended to."""
    mask, rotary = attention_mask(alive).to(hidden.dtype), text.rotary_emb(hidden, ids)
    output: Tensor = layer(hidden, attention_mask=mask, position_ids=ids, position_embeddings=rotary)
    return output


def last_token(valid: Tensor) -> Tensor:
    """(B, L) bool, True at the last token of each sample that is not padding."""
    return valid & ~pad(valid[:, 1:], (0, 1))


def attention_mask(alive: Tensor) -> Tensor:
    """(B, 1, L, L) additive causal mask: 0 if the token of a row attends to that of a column, else minus infinity."""
    column = torch.arange(alive.shape[1], device=alive.device)
    row = column[:, None]
    # Dropped tokens and padding attend to themselves, because a softmax over nothing is undefined. No one reads them.
    seen = ((column <= row) & alive[:, None]) | (column == row)
    return torch.zeros(seen.shape, device=alive.device).masked_fill(~seen, float("-inf"))[:, None]


def position_ids(alive: Tensor, valid: Tensor, positions: str) -> Tensor:
    """(B, L) consecutive numbers of all tokens ("original"), or of the remaining ones ("compact")."""
    return ((alive if positions == "compact" else valid).long().cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def attention_received(text: Any, layer: Any, hidden: Tensor, alive: Tensor, ids: Tensor, query: Tensor) -> Tensor:
    """(B, L) the attention that each token receives in `layer` from its sample's `query` tokens (B, L)."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    heads = (*hidden.shape[:2], -1, attention.head_dim)
    q, k = attention.q_proj(normed).view(heads), attention.k_proj(normed).view(heads)
    if hasattr(attention, "q_norm"):  # Qwen3
        q, k = attention.q_norm(q), attention.k_norm(k)
    cos, sin = text.rotary_emb(hidden, ids)
    q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)  # (B, H, L, d)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # grouped-query attention: several heads share a key
    logits = (q @ k.transpose(2, 3)) * attention.head_dim**-0.5
    probabilities = (logits.float() + attention_mask(alive)).softmax(-1).mean(1)  # (B, L, L)
    weights = query.float() / query.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bq,bqk->bk", weights, probabilities)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` (B, L, H, d) by the angles of `cos` and `sin` (B, L, d): rotary position embeddings."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]


def drop(alive: Tensor, scores: Tensor, visual: Tensor, query: Tensor, predicts: Tensor, keep: float) -> Tensor:
    """(B, L) bool, the `alive` tokens that remain after a drop to the share `keep` of the visual ones."""
    alive = alive.clone()
    for sample in range(len(alive)):
        images = set(visual[sample].tolist()) - {0} if query[sample].any() else set()
        for image in images:
            original = visual[sample] == image
            safe = original & (query[sample] | predicts[sample])
            count = max(int(keep > 0), math.floor(int(original.sum()) * keep), int(safe.sum()))
            ranked = scores[sample].masked_fill(safe, float("inf")).masked_fill(~(original & alive[sample]), -1)
            alive[sample] &= ~original
            alive[sample, ranked.argsort(descending=True, stable=True)[:count]] = True
    return alive


@torch.no_grad()
def generate(text: Any, head: Any, embeds: Tensor, valid: Tensor, visual: Tensor, steps: int, **rule: Any) -> Tensor:
    """(B, steps) greedily decoded tokens after a left-padded prompt; `rule` holds arguments of `forward`."""
    tokens, query = list[Tensor](), last_token(valid)
    for _ in range(steps):
        hidden, _ = forward(text, embeds, valid, visual, query=query, **rule)
        tokens.append(head(hidden[:, -1]).argmax(-1))
        embeds = torch.cat([embeds, text.embed_tokens(tokens[-1])[:, None]], dim=1)
        valid, visual, query = pad(valid, (0, 1), value=True), pad(visual, (0, 1)), pad(query, (0, 1))
    return torch.stack(tokens, dim=1)
