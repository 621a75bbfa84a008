"""Which tokens matter: one small class per scorer, and the registry of their names."""

from pyramiddrop.scoring.attention import (
    AttentionScorer,
    DebiasedScorer,
    InstructionScorer,
    RopeFreeScorer,
    TopHeadsScorer,
    attention_received,
)
from pyramiddrop.scoring.content import DiversityScorer, KeyNormScorer, VariationScorer, VisionScorer
from pyramiddrop.scoring.scorer import Attention, Scorer, ScorerInputs
from pyramiddrop.scoring.wrappers import GridReserveScorer, RandomAfterScorer, RandomScorer, UniformScorer

#: What `score=` of a method may name. A new scorer is a class and a line here.
SCORERS: dict[str, type[Scorer]] = {
    "attention": AttentionScorer,
    "instruction": InstructionScorer,
    "rope_free": RopeFreeScorer,
    "debiased": DebiasedScorer,
    "top_heads": TopHeadsScorer,
    "key_norm": KeyNormScorer,
    "variation": VariationScorer,
    "diversity": DiversityScorer,
    "vision": VisionScorer,
    "random": RandomScorer,
    "uniform": UniformScorer,
}

__all__ = [
    "SCORERS",
    "Attention",
    "AttentionScorer",
    "DebiasedScorer",
    "DiversityScorer",
    "GridReserveScorer",
    "InstructionScorer",
    "KeyNormScorer",
    "RandomAfterScorer",
    "RandomScorer",
    "RopeFreeScorer",
    "Scorer",
    "ScorerInputs",
    "TopHeadsScorer",
    "UniformScorer",
    "VariationScorer",
    "VisionScorer",
    "attention_received",
]
