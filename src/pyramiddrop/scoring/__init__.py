"""Scorers of visual tokens: one small class each, and the registry of their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

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
from pyramiddrop.scoring.wrappers import (
    ComposedScorer,
    GridReserveScorer,
    RandomAfterScorer,
    RandomScorer,
    UniformScorer,
)

#: The names that a method's `score` accepts. A new scorer is a class and a line here.
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


def scorer_of(score: Any) -> Scorer:
    """The scorer for `score`: a scorer, a name, or {"name": ..., **settings}.

    Raises:
        ValueError: if the name is not in SCORERS, or its scorer does not have such settings.
    """
    if isinstance(score, Scorer):
        return score
    settings = dict(score) if isinstance(score, Mapping) else {"name": score}
    name = settings.pop("name", None)
    if name not in SCORERS:
        raise ValueError(f"score must be one of {', '.join(SCORERS)}, or a Scorer; got {score!r}")
    try:
        return SCORERS[name](**settings)
    except TypeError as error:
        raise ValueError(f"score {name!r}: {error}") from error


def scorer_settings(scorer: Any) -> Any:
    """A registered scorer as a JSON value: its name, or {"name": ..., **settings} if it has settings.

    Raises:
        ValueError: if the scorer is not in SCORERS.
    """
    names = [name for name, kind in SCORERS.items() if type(scorer) is kind]
    if not names:
        raise ValueError(f"{type(scorer).__name__} is not in SCORERS: JSON cannot hold it by name")
    settings = {entry.name: getattr(scorer, entry.name) for entry in fields(scorer) if entry.init}
    return names[0] if scorer == SCORERS[names[0]]() else {"name": names[0], **settings}


__all__ = [
    "SCORERS",
    "Attention",
    "AttentionScorer",
    "ComposedScorer",
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
    "scorer_of",
    "scorer_settings",
]
