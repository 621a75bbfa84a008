"""Describe methods, scorers and the options around them: rules, arguments and sources."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, fields

from pyramiddrop.method_spec import NAMES
from pyramiddrop.methods import Method
from pyramiddrop.scoring import SCORERS, GridReserveScorer, RandomAfterScorer, Scorer

METHOD, SCORER, OPTION = "method", "scorer", "option"


@dataclass(frozen=True)
class Entry:
    """One thing that can be chosen.

    Attributes:
        kind: METHOD, SCORER or OPTION.
        name: as a command line has it.
        rule: in one sentence.
        source: where it was published; empty for controls of this library's own.
        arguments: names of its own arguments.
    """

    kind: str
    name: str
    rule: str
    source: str
    arguments: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "arguments": list(self.arguments)}


def all_entries() -> list[Entry]:
    """Methods, then scorers, then options."""
    return [*map(_method, NAMES), *map(_scorer, SCORERS), *OPTIONS]


def _method(name: str) -> Entry:
    kind, shared = NAMES[name], _arguments(Method)
    own = tuple(argument for argument in _arguments(kind) if argument not in shared)
    return Entry(METHOD, name, _rule(kind), kind.source, own)


def _scorer(name: str) -> Entry:
    kind = SCORERS[name]
    return Entry(SCORER, f"score={name}", _rule(kind), kind.source, tuple(_arguments(kind)))


def _rule(kind: type[Method] | type[Scorer]) -> str:
    """The first paragraph of its docstring on one line."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def _arguments(kind: type) -> list[str]:
    return [entry.name for entry in fields(kind) if entry.init]


#: What goes with any scorer.
OPTIONS = (
    Entry(OPTION, "reserve=SHARE", _rule(GridReserveScorer), GridReserveScorer.source),
    Entry(OPTION, "random_from=LAYER", _rule(RandomAfterScorer), RandomAfterScorer.source),
    Entry(
        OPTION,
        "merge=true",
        "What goes is averaged into the kept visual token of its group whose hidden state is nearest by cosine.",
        "after ToMe, arXiv 2210.09461",
    ),
)
