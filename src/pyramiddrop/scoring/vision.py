"""The score that knows the picture and not the question: attention inside the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pyramiddrop.scoring.evidence import Evidence, Scorer


@dataclass(frozen=True)
class VisionScorer(Scorer):
    """Of the method vision alone: the attention that a patch receives in the vision tower.

    It comes from the class token, or from all patches where there is none; in the layer whose output the decoder is
    given, mean over heads.
    """

    watches: ClassVar[bool] = True
    source: ClassVar[str] = "after VisionZip, arXiv 2412.04467"

    def __call__(self, evidence: Evidence) -> Tensor:
        assert evidence.vision is not None, "a scorer that watches is asked before the decoder"
        return evidence.vision
