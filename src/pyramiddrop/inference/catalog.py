"""Describe methods, scorers and model families: rules, arguments, sources, support and limits."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pyramiddrop.families import FAMILIES, Family
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.method_spec import NAMES
from pyramiddrop.methods import Method
from pyramiddrop.scoring import SCORERS, GridReserveScorer, RandomAfterScorer, Scorer

METHOD, SCORER, OPTION = "method", "scorer", "option"


@dataclass(frozen=True)
class MethodEntry:
    """A method, a scorer or an option.

    Attributes:
        kind: METHOD, SCORER or OPTION.
        name: its name on the command line.
        source: its publication; empty for this library's own controls.
    """

    kind: str
    name: str
    rule: str
    source: str
    arguments: tuple[str, ...] = ()


def all_entries() -> list[MethodEntry]:
    """All methods, then scorers, then options."""
    shared = _arguments(Method)
    methods = [
        MethodEntry(METHOD, name, _rule(kind), kind.source, tuple(one for one in _arguments(kind) if one not in shared))
        for name, kind in NAMES.items()
    ]
    scorers = [
        MethodEntry(SCORER, f"score={name}", _rule(kind), kind.source, tuple(_arguments(kind)))
        for name, kind in SCORERS.items()
    ]
    return [*methods, *scorers, *OPTIONS]


def _rule(kind: type[Method] | type[Scorer]) -> str:
    """The first paragraph of the docstring on one line."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def _arguments(kind: type) -> list[str]:
    return [entry.name for entry in fields(kind) if entry.init]


#: Options that combine with any scorer.
OPTIONS = (
    MethodEntry(OPTION, "reserve=SHARE", _rule(GridReserveScorer), GridReserveScorer.source),
    MethodEntry(OPTION, "random_from=LAYER", _rule(RandomAfterScorer), RandomAfterScorer.source),
    MethodEntry(
        OPTION,
        "merge=true",
        "What goes is averaged into the kept visual token of its group whose hidden state is nearest by cosine.",
        "after ToMe, arXiv 2210.09461",
    ),
)


PROVEN, REFUSED, BY_STRUCTURE = "proven", "refused", "by structure"
TESTED = {PROVEN: "conformance", REFUSED: "refusal", BY_STRUCTURE: "not proven"}
SAYS = {
    PROVEN: "a tiny random checkpoint passes the conformance suite",
    REFUSED: "applying any method raises UnsupportedModelError, and leaves no hook behind",
    BY_STRUCTURE: "Transformers has the family, this library has no entry: its parts are looked for when a method is "
    "applied, which works or is refused by name; nothing is proven",
}


@dataclass(frozen=True)
class FamilyEntry:
    """A model family: its name in Transformers, and its record (an empty one if it is not `known`)."""

    model_type: str
    family: Family
    known: bool = True

    @property
    def status(self) -> str:
        """PROVEN, REFUSED or BY_STRUCTURE."""
        if not self.known:
            return BY_STRUCTURE
        return REFUSED if self.family.refused else PROVEN

    @property
    def limits(self) -> list[str]:
        """The reason of its refusal, or its restrictions, in sentences."""
        return [self.family.refused] if self.family.refused else [limit.description for limit in self.family.limits]

    def as_dict(self) -> dict[str, Any]:
        """The family as JSON values."""
        return {
            "family": self.model_type,
            "text_models": list(self.family.text),
            "modalities": list(self.family.modalities) if self.known else [],
            "status": self.status,
            "refused": self.family.refused or None,
            "limits": [asdict(limit) for limit in self.family.limits],
            "tested": TESTED[self.status],
        }


def all_families() -> list[FamilyEntry]:
    """All families with a record (proven, then refused), then Transformers' other image-text-to-text models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    known = [FamilyEntry(name, FAMILIES[name]) for name in sorted(FAMILIES)]
    other = [FamilyEntry(name, Family(), known=False) for name in sorted(set(NAMES) - set(FAMILIES))]
    return sorted(known, key=lambda entry: entry.status == REFUSED) + other


def find_family(model: str) -> FamilyEntry:
    """The family of a model type, or of the checkpoint in a folder. Raises InputError if there is no family of that
    name."""
    name, config = model, Path(model) / "config.json"
    if config.parent.is_dir():
        with user_input(f"no model type in {config}", (OSError, ValueError, KeyError, TypeError)):
            name = str(json.loads(config.read_text("utf-8"))["model_type"])
    entries = {entry.model_type: entry for entry in all_families()}
    if name in entries:
        return entries[name]
    near = get_close_matches(name, entries, 3)
    advice = f"did you mean {', '.join(near)}?" if near else "`pyramiddrop families` lists them"
    raise InputError(f"{name!r} is no family of vision-language models known here, and {model!r} no folder; {advice}")
