"""Scorers without a query: from a visual token's own key or hidden state, or its patch in the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pyramiddrop.cost import DecoderShape, DropCounts, projecting_flops
from pyramiddrop.scoring.scorer import Scorer, ScorerInputs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KeyNormScorer(Scorer):
    """Keep tokens with a small key norm (mean over heads): such keys were observed to receive much attention."""

    needs_attention: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2406.11430"

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        return -inputs.keys().float().norm(dim=-1).mean(1)  # type: ignore[no-any-return]

    def flops(self, shape: DecoderShape, drop: DropCounts) -> int:
        return projecting_flops(shape, drop.rows, drop.queries)


@dataclass(frozen=True)
class VariationScorer(Scorer):
    """Keep tokens whose hidden states changed most in the layer before the ranking layer (Euclidean distance)."""

    needs_previous_hidden: ClassVar[bool] = True
    source: ClassVar[str] = "V2Drop, arXiv 2509.01552"

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        assert inputs.previous is not None, "the scorer needs the previous hidden states"
        changed: Tensor = (inputs.hidden.float() - inputs.previous.float()).norm(dim=-1)
        return changed


@dataclass(frozen=True)
class DiversityScorer(Scorer):
    """Keep tokens that are far from each other: greedy max-min cosine distance of hidden states, in each group.

    The first token is the one farthest from its group's mean; each next one is the token whose nearest chosen token is
    farthest. Tokens chosen earlier score higher.
    """

    source: ClassVar[str] = "max-min diversity (DivPrune, arXiv 2503.02175); own implementation"

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        import torch
        from torch.nn.functional import normalize

        visual, groups, num_keep = inputs.visual, inputs.groups, inputs.num_keep
        unit = normalize(inputs.hidden.float(), dim=-1)
        distance = 1 - unit @ unit.transpose(1, 2)
        owners = groups[..., None].expand_as(unit)
        sums = unit.new_zeros(*num_keep.shape, unit.shape[-1])
        sums = sums.scatter_add(1, owners, unit.masked_fill(~visual[..., None], 0))
        # Nothing is chosen yet: every distance is 2, the maximum, and the distance from the group's mean decides.
        nearest = 2 + 1 - (unit * normalize(sums, dim=-1).gather(1, owners)).sum(-1)
        nearest = nearest.masked_fill(~visual, float("-inf"))
        scores, left = torch.zeros_like(nearest), num_keep.clone()
        samples, steps = torch.arange(len(num_keep), device=num_keep.device), int(num_keep.sum(1).max())
        for step in range(steps):
            open_group = left.gather(1, groups) > 0
            chosen = nearest.masked_fill(~open_group, float("-inf")).argmax(1)
            scores[samples, chosen] = torch.maximum(scores[samples, chosen], scores.new_tensor(steps - step))
            group = groups[samples, chosen]
            left[samples, group] -= 1
            same = groups == group[:, None]
            nearest = torch.where(same, torch.minimum(nearest, distance[samples, chosen]), nearest)
            nearest[samples, chosen] = float("-inf")
        return scores

    def flops(self, shape: DecoderShape, drop: DropCounts) -> int:
        return 2 * drop.rows * drop.rows * shape.hidden


@dataclass(frozen=True)
class VisionScorer(Scorer):
    """The attention that a patch receives in the vision tower; for drops before the decoder.

    It is the attention from the class token, or from all patches if there is none, in the layer whose output the
    decoder receives, mean over heads.
    """

    needs_vision_attention: ClassVar[bool] = True
    source: ClassVar[str] = "after VisionZip, arXiv 2412.04467"

    def __call__(self, inputs: ScorerInputs) -> Tensor:
        assert inputs.vision is not None, "the score is known before the decoder alone"
        return inputs.vision
