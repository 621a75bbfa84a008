"""Where a member of the zoo needs another rule than the rest, and what the library refuses on it, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reference import Rule
from zoo import Member


@dataclass(frozen=True)
class Setup:
    """How the checks run on a member.

    Attributes:
        layers: before which tokens are dropped.
        keep: the share of the original visual tokens that stays after each drop.
        fastv: the layer of the check with one early drop.
        impossible: check -> why the untouched model cannot do it, where the zoo does not say so.
        refused: check -> words of the error by which the library refuses it; "*" stands for every check.
    """

    layers: tuple[int, ...] = (2, 4, 6)
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    fastv: int = 2
    impossible: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def rule(self, rank_layer: str = "next", per_image: bool = False) -> Rule:
        """The staged rule."""
        return Rule(self.layers, self.keep, rank_layer=rank_layer, per_image=per_image)

    @property
    def fastv_rule(self) -> Rule:
        """FastV as a rule."""
        return Rule([self.fastv], [0.5], rank_layer="last")

    def refusal(self, check: str) -> str | None:
        """Words of the refusal that a check must meet, or None where it must pass."""
        return self.refused.get(check, self.refused.get("*"))


# Members that are not here run with the rule above and are refused nothing.
SETUPS: dict[str, Setup] = {}

# One member for every kind of text model: what the fast tests run on.
FAST = ("llava", "llava_next", "qwen2_vl", "qwen3_vl")


def setup_of(member: Member) -> Setup:
    """The member's entry, or the common one."""
    return SETUPS.get(member.name, Setup())
