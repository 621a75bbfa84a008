"""Format quantities to three digits, and load the HTML templates that use them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

UNKNOWN = "not known"


def flops(value: float) -> str:
    """`2.14 GFLOPs`"""
    return _scaled(value, 1000, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs"))


def size(value: float) -> str:
    """`1.5 MiB`"""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def seconds(value: float) -> str:
    """`12.3 ms`, or `1.23 s`"""
    return f"{_three(value * 1000)} ms" if value < 1 else f"{_three(value)} s"


def share(value: float) -> str:
    """`54 %`"""
    return UNKNOWN if math.isnan(value) else f"{value * 100:.0f} %"


def arrow(counts: Iterable[int]) -> str:
    """`576 → 288 → 144`"""
    return " → ".join(map(str, counts))


def _scaled(value: float, base: int, names: Sequence[str]) -> str:
    if math.isnan(value):
        return UNKNOWN
    if value == 0:
        return f"0 {names[0]}"
    power = 0
    while value >= base and power < len(names) - 1:
        value, power = value / base, power + 1
    return f"{_three(value)} {names[power]}"


def _three(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"


def template(name: str) -> Template:
    """The template `name`.html.j2, with the units of this project as filters."""
    environment = Environment(
        loader=PackageLoader("pyramiddrop.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"flops": flops, "size": size, "seconds": seconds, "share": share}
    return environment.get_template(f"{name}.html.j2")
