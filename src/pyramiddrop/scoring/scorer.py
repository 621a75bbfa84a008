"""The interface of a scorer, and its inputs at a drop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from pyramiddrop.cost import DecoderShape, DropCounts

if TYPE_CHECKING:
    from torch import Tensor

#: The largest finite float32, below the infinite score of tokens that must be kept.
LARGEST = (2 - 2**-23) * 2.0**127


class Attention(Protocol):
    """Computes the ranking layer's attention on demand, so that scorers that do not need it pay nothing."""

    def __call__(self, *, instruction: bool = False, rotated: bool = True) -> Tensor:
        """(B, H, N) float32: the attention that each row receives in each head, mean over the query tokens.

        Args:
            instruction: use all instruction tokens as queries instead of the query tokens (the prompt's last one).
                Instruction tokens are the text after a sample's last visual token, up to its last query token, without
                answers. A sample without such text uses its query tokens.
            rotated: apply the model's rotary position embeddings; False: as if every token were at position 0.
        """
        ...


@dataclass
class ScorerInputs:
    """The inputs of a scorer at a drop: B samples, N remaining rows, G groups of visual tokens.

    The tokens of a group share a quota: all visual tokens of a sample, or those of one image if each has its own.

    Attributes:
        layer: the 0-based layer before which tokens are dropped.
        visual: (B, N) bool, the remaining visual tokens.
        token_index: (B, N) long, the number of each visual token among the ORIGINAL ones of its sample, from 0.
        groups: (B, N) long, the group of each visual token, ascending along the row.
        num_keep: (B, G) long, how many tokens of each group will be kept.
        hidden: (B, N, D), the input hidden states of the ranking layer.
        attention: computes the ranking layer's attention.
        keys: computes (B, Hkv, N, d), the ranking layer's keys.
        previous: (B, N, D), the input hidden states of the layer before the ranking layer; only if the scorer
            `needs_previous_hidden`.
        vision: (B, N), the attention that each visual token's patch receives in the vision tower; only before the
            decoder, and if the scorer `needs_vision_attention`.
    """

    layer: int
    visual: Tensor
    token_index: Tensor
    groups: Tensor
    num_keep: Tensor
    hidden: Tensor
    attention: Attention
    keys: Callable[[], Tensor]
    previous: Tensor | None = None
    vision: Tensor | None = None

    def per_token(self, per_group: Tensor) -> Tensor:
        """(B, N): the value of each row's group in `per_group` (B, G)."""
        return per_group.gather(1, self.groups)

    def per_group(self, per_token: Tensor) -> Tensor:
        """(B, G): the sum of `per_token` (B, N) over the visual tokens of each group."""
        zeros = per_token.new_zeros(self.num_keep.shape)
        return zeros.scatter_add(1, self.groups, per_token.masked_fill(~self.visual, 0))


class Scorer(ABC):
    """Gives each row a score; of the visual tokens of a group, those with the highest scores are kept.

    Attributes:
        needs_attention: True if it reads the ranking layer's attention or keys, which this layer must then have.
        needs_previous_hidden: True if it reads `ScorerInputs.previous`.
        needs_vision_attention: True if it reads `ScorerInputs.vision`, which is only known before the decoder.
        source: the paper of the score.
    """

    needs_attention: ClassVar[bool] = False
    needs_previous_hidden: ClassVar[bool] = False
    needs_vision_attention: ClassVar[bool] = False
    source: ClassVar[str] = ""

    @abstractmethod
    def __call__(self, inputs: ScorerInputs) -> Tensor:
        """(B, N) float32 scores; those of text rows are ignored. Of equal scores, the lower column is kept."""

    def flops(self, shape: DecoderShape, drop: DropCounts) -> int:
        """FLOPs of scoring at one drop of one sample: matrix products, 2 for a multiply-add."""
        return 0
