"""Which runs of visual tokens are one image's, where other tokens stand between its parts: told by the ids around them.

Each rule is what the family's processor writes around the parts. Where a row does not look like that, nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

#: (ids of a row, its runs of visual tokens) -> whether an image begins at each run, or None where that is not known.
Beginnings = Callable[[Sequence[int], Sequence[range]], list[bool] | None]

_INSIDE = 2  # the most tokens that any rule's processor writes between two parts, where an end token tells images apart


def tile_lengths(
    beginnings: Beginnings,
) -> Callable[[PretrainedConfig, Mapping[str, Any], Tensor], Sequence[int] | None]:
    """How many visual tokens each image of a call has, by a rule for the runs of one row."""

    def lengths(config: PretrainedConfig, call: Mapping[str, Any], image: Tensor) -> Sequence[int] | None:
        ids, found = call.get("input_ids"), list[int]()
        if ids is None:
            return None
        for row, mask in zip(ids.tolist(), image, strict=True):
            runs = _runs(mask)
            begins = [True] * len(runs) if len(runs) < 2 else beginnings(row, runs)
            if begins is None:
                return None
            for run, new in zip(runs, begins, strict=True):
                found += [0] * new
                found[-1] += len(run)
        return found

    return lengths


def one_between(ids: Sequence[int], runs: Sequence[range]) -> list[bool]:
    """One token stands between two parts of an image (a line break, a separator), and more between two images."""
    return [True, *(after.start - before.stop > 1 for before, after in pairwise(runs))]


def end_behind(ids: Sequence[int], runs: Sequence[range]) -> list[bool] | None:
    """A token that is behind no other part ends each image, and so the row's last one."""
    if runs[-1].stop == len(ids):
        return None
    behind = [ids[run.stop] for run in runs]
    ends = [token == behind[-1] for token in behind]
    gaps = [after.start - before.stop for before, after in pairwise(runs)]
    if any(gap > _INSIDE and not ended for gap, ended in zip(gaps, ends, strict=False)):
        return None
    return [True, *ends[:-1]]


def whole_last(ids: Sequence[int], runs: Sequence[range]) -> list[bool] | None:
    """The same token before each part, then the part's name; the last part is the whole image, which names it, and the
    first token stands behind it, too (Idefics3)."""
    frame = _frame(ids, runs)
    if frame is None or runs[-1].stop == len(ids):
        return None
    names = [ids[run.start - 1] for run in runs]
    ends = [name == names[-1] for name in names]
    if any(ended and ids[run.stop] != frame for run, ended in zip(runs, ends, strict=True)):
        return None
    return [True, *ends[:-1]]


def tile_first(ids: Sequence[int], runs: Sequence[range]) -> list[bool] | None:
    """The same token before each part, then the part's name; each image begins with a part of one and the same name
    (Granite Docling)."""
    if _frame(ids, runs) is None:
        return None
    names = [ids[run.start - 1] for run in runs]
    return [name == names[0] for name in names]


def _frame(ids: Sequence[int], runs: Sequence[range]) -> int | None:
    """The token two before every part, or None where that is not always the same one."""
    if runs[0].start < 2:
        return None
    found = {ids[run.start - 2] for run in runs}
    return found.pop() if len(found) == 1 else None


def _runs(mask: Tensor) -> list[range]:
    """The runs of True in (L,) `mask`."""
    columns = mask.nonzero()[:, 0].tolist()
    breaks = [0, *(place for place, (left, right) in enumerate(pairwise(columns), 1) if right > left + 1), len(columns)]
    return [range(columns[first], columns[last - 1] + 1) for first, last in pairwise(breaks) if last > first]
