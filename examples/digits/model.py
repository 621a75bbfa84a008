"""Owns the training-only model: a small LLaVA that answers many questions about one picture in one pass.

The picture and the start of the prompt are computed once; the questions follow side by side in slots of equal length,
and a slot sees the prefix and itself alone. Each parameter has the name and the meaning that it has in Hugging Face's
``LlavaForConditionalGeneration``, so that the export is a copy (``export.py``) and the logits agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_EPS = 1e-6
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of the model. 64 visual tokens: an 80 x 80 picture in patches of 10 x 10."""

    vocabulary: int
    hidden: int = 128
    layers: int = 8
    heads: int = 4
    inner: int = 352
    vision_hidden: int = 128
    vision_layers: int = 3
    vision_heads: int = 4
    vision_inner: int = 256
    image: int = 80
    patch: int = 10
    positions: int = 512

    @property
    def visual_tokens(self) -> int:
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class Packing:
    """How questions lie behind a prefix: ``slots`` of ``width`` tokens, after ``prefix`` tokens."""

    prefix: int
    slots: int
    width: int

    def positions(self) -> Tensor:
        """Every slot continues the prefix: its positions are those of an ordinary prompt."""
        slot = self.prefix + torch.arange(self.width)
        return torch.cat([torch.arange(self.prefix), slot.repeat(self.slots)])


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of everything to everything, written out; all are (B, heads, T, d)."""
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


class VisionLayer(nn.Module):
    attention = staticmethod(full_attention)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.vision_hidden
        self.heads = config.vision_heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, config.vision_inner), nn.Linear(config.vision_inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm1(x)
        q, k, v = (split_heads(layer(y), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(join_heads(self.attention(q, k, v)))
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class VisionTower(nn.Module):
    """CLIP's vision transformer; gives the patch features of the last layer, without the class token."""

    layer_class = VisionLayer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.patch = config.vision_hidden, config.patch
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Linear(3 * config.patch**2, width, bias=False)
        self.position_embedding = nn.Embedding(config.visual_tokens + 1, width)
        self.pre_layrnorm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(self.layer_class(config) for _ in range(config.vision_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(cut(pixels, self.patch))
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.position_embedding.weight
        x = self.pre_layrnorm(x)
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:]


def cut(pixels: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) -> (B, patches, 3 * patch * patch), row by row."""
    grid = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Causal attention in which a slot sees the prefix and itself. All are (B, heads, prefix + slots * width, d).

    Written out in small products: no mask over the whole sequence, and nothing is computed for a mask to discard.
    """
    batch, heads, _, depth = q.shape
    prefix, slots, width = packing.prefix, packing.slots, packing.width
    q = q * depth**-0.5
    keys, values = k[:, :, :prefix], v[:, :, :prefix]
    scores = (q[:, :, :prefix] @ keys.mT).masked_fill(~lower_triangle(prefix), -1e9)
    before = scores.softmax(-1) @ values

    asking = q[:, :, prefix:]
    own = (asking, k[:, :, prefix:], v[:, :, prefix:])
    own_q, own_k, own_v = (part.reshape(batch, heads, slots, width, depth) for part in own)
    to_prefix = asking @ keys.mT
    to_self = (own_q @ own_k.mT).masked_fill(~lower_triangle(width), -1e9).reshape(batch, heads, slots * width, width)
    attention = torch.cat([to_prefix, to_self], dim=-1).softmax(-1)
    on_self = attention[..., prefix:].reshape(batch, heads, slots, width, width) @ own_v
    after = attention[..., :prefix] @ values + on_self.reshape(batch, heads, slots * width, depth)
    return torch.cat([before, after], dim=2)


class DecoderLayer(nn.Module):
    attention = staticmethod(packed_attention)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        width, inner = config.hidden, config.inner
        linear = partial(nn.Linear, bias=False)
        self.input_layernorm = nn.Parameter(torch.ones(width))
        self.q_proj, self.k_proj, self.v_proj = (linear(width, width) for _ in range(3))
        self.o_proj = linear(width, width)
        self.post_attention_layernorm = nn.Parameter(torch.ones(width))
        self.gate_proj, self.up_proj, self.down_proj = linear(width, inner), linear(width, inner), linear(inner, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packing: Packing) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], self.input_layernorm, RMS_EPS)
        q, k, v = (split_heads(layer(y), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        seen = self.attention(rotate(q, cos, sin), rotate(k, cos, sin), v, packing)
        x = x + self.o_proj(join_heads(seen))
        y = F.rms_norm(x, x.shape[-1:], self.post_attention_layernorm, RMS_EPS)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class PackedLlava(nn.Module):
    """The model. ``start`` are the token ids before the picture; questions come as (B, slots * width) token ids."""

    tower_class, layer_class = VisionTower, DecoderLayer

    def __init__(self, config: ModelConfig, start: list[int]) -> None:
        super().__init__()
        self.config = config
        self.vision = self.tower_class(config)
        self.linear_1 = nn.Linear(config.vision_hidden, config.hidden)
        self.linear_2 = nn.Linear(config.hidden, config.hidden)
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(self.layer_class(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.hidden))
        self.register_buffer("start", torch.tensor(start), persistent=False)
        initialise(self)

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, 64, hidden): what stands in the prompt for the picture."""
        return self.linear_2(F.gelu(self.linear_1(self.vision(pixels))))

    def packing(self, slots: int, width: int) -> Packing:
        return Packing(len(self.start) + self.config.visual_tokens, slots, width)

    def rotary(self, packing: Packing) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions."""
        return rotary_table(packing.positions(), self.config.hidden // self.config.heads)

    def forward(self, pixels: Tensor, ids: Tensor, packing: Packing) -> Tensor:
        """The logits of the question tokens, (B, slots * width, vocabulary)."""
        return self.answer(self.image_features(pixels), ids, packing)

    def answer(self, features: Tensor, ids: Tensor, packing: Packing) -> Tensor:
        """The same from the picture's features."""
        start = self.embed_tokens(self.start).expand(len(features), -1, -1)
        x = torch.cat([start, features, self.embed_tokens(ids)], dim=1)
        cos, sin = self.rotary(packing)
        for layer in self.layers:
            x = layer(x, cos, sin, packing)
        x = F.rms_norm(x[:, packing.prefix :], (self.config.hidden,), self.norm, RMS_EPS)
        return F.linear(x, self.embed_tokens.weight)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, hidden) -> (B, heads, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, T, d) -> (B, T, hidden)."""
    return x.transpose(1, 2).flatten(2)


def lower_triangle(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def rotary_table(positions: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, (T, d) each."""
    frequencies = ROPE_BASE ** (-torch.arange(0, depth, 2).float() / depth)
    angles = (positions[:, None].float() * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


@torch.no_grad()
def initialise(model: PackedLlava, similarity: float = 0.8) -> None:
    """Weights from which retrieval is learned soon (and without which it was not learned at all within 300 steps).

    The answer is formed at the prompt's last token, "ASSISTANT:", which itself says nothing. So layer 0 begins as "add
    the words of the question", and the later layers as "find what is like me, and copy it": their keys start close to
    their queries, and all output projections start as transposes of the values. The final norm starts at a size at
    which a copied embedding gives a useful logit.
    """
    layers, width = model.config.layers, model.config.hidden
    for name, parameter in model.named_parameters():
        if name == "embed_tokens.weight":
            nn.init.normal_(parameter, std=0.5)
        elif "position_embedding" in name or "class_embedding" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim == 2:
            closes_block = name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight", "out_proj.weight"))
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * ((2 * layers) ** -0.5 if closes_block else 1))
    model.norm.fill_(3 / width**0.5)
    word = mark_words(model)
    for index, layer in enumerate(model.layers):
        query, key, value = layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight
        if index == 0:
            nn.init.orthogonal_(value)
        value -= torch.outer(value @ word, word)
        if index == 0:
            attend_to_words(model, layer, word)
        else:
            key.copy_(similarity * query + (1 - similarity**2) ** 0.5 * key)
            key -= torch.outer(key @ word, word)
        layer.o_proj.weight.copy_(value.T * (4.0 if index == 0 else 0.35))


def mark_words(model: PackedLlava) -> Tensor:
    """Give all words (not the start of the prompt, and so not the picture) one common direction, and return it."""
    embeddings = model.embed_tokens.weight
    word = F.normalize(torch.randn(embeddings.shape[1]), dim=0)
    words = [index for index in range(len(embeddings)) if index not in model.start.tolist()]
    embeddings[words] += 0.5 * embeddings.shape[1] ** 0.5 * word
    return word


def attend_to_words(model: PackedLlava, layer: DecoderLayer, word: Tensor, logit: float = 5.0) -> None:
    """Let every head of a layer prefer words to the picture by ``logit``, along low frequencies of the rotation."""
    depth = model.config.hidden // model.config.heads
    slow = torch.zeros(depth // 2)
    slow[depth // 8 : depth // 4] = 1
    direction = F.normalize(slow.repeat(2), dim=0).repeat(model.config.heads)
    size = (logit * depth**0.5 / (model.config.hidden / 2)) ** 0.5
    layer.q_proj.weight += size * torch.outer(direction, word)
    layer.k_proj.weight += size * torch.outer(direction, word)
