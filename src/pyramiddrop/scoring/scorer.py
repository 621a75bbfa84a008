"""What a scorer gets at a drop, and the interface of a scorer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from pyramiddrop.cost import DecoderShape, DropCounts

if TYPE_CHECKING:
    from torch import Tensor

#: The largest finite float32, below the infinity that tokens have that must stay.
LARGEST = (2 - 2**-23) * 2.0**127


class Attention(Protocol):
    """Computes what the ranking layer's heads attend to; called by the scorers that need it, so that others pay
    nothing."""

    def __call__(self, *, instruction: bool = False, rotated: bool = True) -> Tensor:
        """(B, H, N) float32: the attention that each row receives in each head, mean over the asking tokens.

        Args:
            instruction: ask with every instruction token, not with the query tokens (the prompt's last one) alone.
                Instruction tokens are the text behind a sample's last visual token, up to its last query token,
                answers left out; where there is none, the query tokens ask.
            rotated: with the model's rotary position embeddings; False: as if every token stood at position 0.
        """
        ...


@dataclass
class ScorerInputs:
    """What a scorer may look at at a drop. B samples, N rows still in the sequence, G groups of visual tokens.

    A group is what shares a quota: all visual tokens of a sample, or one image where each image has its own.

    Attributes:
        layer: the 0-based layer before which tokens are dropped.
        visual: (B, N) bool, the visual tokens that are still there.
        token_index: (B, N) long, the number of each visual token among the ORIGINAL ones of its sample, from 0.
        groups: (B, N) long, the group of each visual token, ascending along the row.
        num_keep: (B, G) long, how many tokens of each group will stay.
        hidden: (B, N, D), the hidden states that the ranking layer receives.
        attention: computes what the ranking layer attends to.
        keys: computes (B, Hkv, N, d), the ranking layer's keys.
        previous: (B, N, D), what the layer before the ranking layer received; given if the scorer
            `needs_previous_hidden`.
        vision: (B, N), the attention that each visual token's patch receives in the vision tower; given before the
            decoder, where the scorer `needs_vision_attention`.
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
        """(B, N): for each row the number that its group has in `per_group` (B, G)."""
        return per_group.gather(1, self.groups)

    def per_group(self, per_token: Tensor) -> Tensor:
        """(B, G): for each group the sum over its visual tokens of `per_token` (B, N)."""
        zeros = per_token.new_zeros(self.num_keep.shape)
        return zeros.scatter_add(1, self.groups, per_token.masked_fill(~self.visual, 0))


class Scorer(ABC):
    """Gives each row a score; among the visual tokens of a group, the highest scores stay.

    Attributes:
        needs_attention: whether it asks for the ranking layer's attention or keys, so that this layer must have them.
        needs_previous_hidden: whether it reads `ScorerInputs.previous`.
        needs_vision_attention: whether it reads `ScorerInputs.vision`, which is known before the decoder alone.
        source: where the rule was published.
    """

    needs_attention: ClassVar[bool] = False
    needs_previous_hidden: ClassVar[bool] = False
    needs_vision_attention: ClassVar[bool] = False
    source: ClassVar[str] = ""

    @abstractmethod
    def __call__(self, inputs: ScorerInputs) -> Tensor:
        """(B, N) float32; what rows other than visual ones get is ignored. Ties are broken by the lower column."""

    def flops(self, shape: DecoderShape, drop: DropCounts) -> int:
        """What scoring costs at one drop of one sample, by matrix products, 2 for a multiply-add."""
        return 0
