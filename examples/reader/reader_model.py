"""The reader's training-only model: the digits model with 576 visual tokens, for a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from reader_text import SLOTS, TOKEN_ID, VOCABULARY, WIDTH
from shared import BOS, USER, DecoderLayer, ModelConfig, PackedLlava, Packing, VisionLayer, VisionTower, rotary_table
from torch import Tensor

from pyramiddrop.evaluation.reader import IMAGE, PATCH
from pyramiddrop.evaluation.reader.canvas import CHANNELS

GROUND = 0.1  # what a patch that shows nothing weighs in the alignment
START = [TOKEN_ID[BOS], TOKEN_ID[USER]]


def reader_config(hidden: int = 192, layers: int = 12, tower_layers: int = 4) -> ModelConfig:
    """The sizes of the reader: 7.2 million parameters as it is bundled."""
    return ModelConfig(
        vocabulary=len(VOCABULARY),
        hidden=hidden,
        layers=layers,
        heads=4,
        inner=hidden * 8 // 3 // 16 * 16,
        vision_hidden=hidden,
        vision_layers=tower_layers,
        vision_heads=4,
        vision_inner=hidden * 10 // 3 // 16 * 16,
        image=IMAGE,
        patch=PATCH,
        positions=1024,
    )


@dataclass(frozen=True)
class MaskedPacking(Packing):
    """Where questions lie, with what PyTorch's attention and the rotary embedding need to know of it."""

    mask: Tensor  # (slots * width, prefix + slots * width): what a token of a question sees
    cos: Tensor
    sin: Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)


def packed_sdpa(q: Tensor, k: Tensor, v: Tensor, packing: MaskedPacking) -> Tensor:
    """Causal attention within the prefix; a question sees the prefix and itself. All are (B, heads, T, d)."""
    prefix, q, k = packing.prefix, q.to(v.dtype), k.to(v.dtype)
    before = F.scaled_dot_product_attention(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], is_causal=True)
    after = F.scaled_dot_product_attention(q[:, :, prefix:], k, v, attn_mask=packing.mask)
    return torch.cat([before, after], dim=2)


class ReaderVisionLayer(VisionLayer):
    attention = staticmethod(sdpa)


class ReaderTower(VisionTower):
    layer_class = ReaderVisionLayer


class ReaderLayer(DecoderLayer):
    attention = staticmethod(packed_sdpa)


class ReaderLlava(PackedLlava):
    """The digits model with PyTorch's fused attention."""

    tower_class, layer_class = ReaderTower, ReaderLayer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, START)
        for channel, words in CHANNELS.items():
            ids = torch.tensor([TOKEN_ID[word] for word in words])
            self.register_buffer(f"{channel}_ids", ids, persistent=False)
            weight = torch.ones(len(words))
            weight[0] = GROUND
            self.register_buffer(f"{channel}_weight", weight, persistent=False)

    def packing(self, slots: int = SLOTS, width: int = WIDTH) -> MaskedPacking:
        plain, device = super().packing(slots, width), self.start.device
        own = torch.block_diag(*[torch.ones(width, width).tril()] * slots)
        mask = torch.cat([torch.ones(slots * width, plain.prefix), own], dim=1).bool()
        cos, sin = rotary_table(plain.positions(), self.config.hidden // self.config.heads)
        return MaskedPacking(plain.prefix, slots, width, mask.to(device), cos.to(device), sin.to(device))

    def rotary(self, packing: MaskedPacking) -> tuple[Tensor, Tensor]:
        return packing.cos, packing.sin

    def alignment_losses(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each picture feature should look like the words for what its patch shows.

        Args:
            features: (B, 576, hidden), the picture's.
            labels: (B, 576, channels), indices into the words of each channel of `CHANNELS`; -1 is open, 0 nothing.

        Returns:
            The loss of each channel, and the share of patches with something to say that say it.
        """
        normed = F.rms_norm(features.float(), (self.config.hidden,)).flatten(0, 1)
        logits = (normed @ self.embed_tokens.weight.T).float() * (3 / self.config.hidden**0.5)
        losses, right = [], []
        for channel, target in zip(CHANNELS, labels.flatten(0, 1).long().unbind(-1), strict=True):
            own = logits[:, getattr(self, f"{channel}_ids")]
            losses.append(F.cross_entropy(own, target, getattr(self, f"{channel}_weight"), ignore_index=-1))
            says = target > 0
            right.append(((own.argmax(-1) == target) & says).sum() / says.sum().clamp(min=1))
        return torch.stack(losses), torch.stack(right).detach()


def to_pixels(images: Tensor) -> Tensor:
    """(B, 336, 336, 3) uint8 -> (B, 3, 336, 336) in [-1, 1], as the exported image processor gives them."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
