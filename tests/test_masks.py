"""Masks of pruned layers against the rule in words, entry by entry: near enough, not later, no padding, no filler."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyramiddrop.hf.cache_state import CacheIndex
from pyramiddrop.hf.masks import FULL, AttentionScope, MaskSpec, follow_mask, follow_recurrent_mask
from pyramiddrop.hf.rows import Selection

SCOPES = (FULL, AttentionScope("sliding", 4), AttentionScope("chunked", 5))
LOWEST = torch.finfo(torch.float32).min


@dataclass
class Case:
    """A batch of `past + length` columns, of which `length` are this call's.

    Attributes:
        starts: per sample, the first column that is no padding.
        slots: what the layer's cache hands out, with this call's rows.
        kept: this call's rows, or None for the last `count`.
    """

    scope: AttentionScope
    past: int
    length: int
    starts: list[int]
    slots: CacheIndex
    kept: Selection | None
    count: int

    @property
    def total(self) -> int:
        return self.past + self.length

    def near(self, sample: int, query: int, key: int) -> bool:
        """The layer's own rule."""
        if self.scope.kind == "sliding":
            return key > query - self.scope.size
        if self.scope.kind == "chunked":
            start = self.starts[sample]
            return (key - start) // self.scope.size == (query - start) // self.scope.size
        return True

    def sees(self, sample: int, query: int, key: int) -> bool:
        return self.starts[sample] <= key <= query and self.near(sample, query, key)

    def full(self) -> Tensor:
        """(B, 1, length, total) bool, the mask that the untouched model makes."""
        rows = range(self.past, self.total)
        return torch.tensor(
            [[[[self.sees(b, q, k) for k in range(self.total)] for q in rows]] for b in range(len(self.starts))]
        )

    def padding(self) -> Tensor:
        return torch.tensor([[int(column >= start) for column in range(self.total)] for start in self.starts])

    def queries(self, sample: int) -> list[int | None]:
        """The column of each row that is computed; None for filler."""
        if self.kept is None:
            return list(range(self.total - self.count, self.total))
        alive = [True] * self.count if self.kept.valid is None else self.kept.valid[sample].tolist()
        return [
            row + self.past if real else None for row, real in zip(self.kept.rows[sample].tolist(), alive, strict=True)
        ]

    def check(self, mask: Tensor) -> None:
        """Entry by entry; a row of filler may see what it likes, but something."""
        seen = mask >= 0 if mask.is_floating_point() else mask
        assert seen.shape == (len(self.starts), 1, self.count, self.slots.columns.shape[1])
        if mask.is_floating_point():
            assert set(mask.unique().tolist()) <= {0.0, LOWEST}
        for sample in range(len(self.starts)):
            for number, query in enumerate(self.queries(sample)):
                found = seen[sample, 0, number].tolist()
                if query is None:
                    assert any(found)
                    continue
                columns, alive = self.slots.columns[sample].tolist(), self.slots.alive[sample].tolist()
                wanted = [a and self.sees(sample, query, key) for key, a in zip(columns, alive, strict=True)]
                if self.starts[sample] <= query:
                    assert found == wanted, (sample, query)

    def spec(self, attention: str = "sdpa", counts_columns: bool = True, padded: bool = True) -> MaskSpec:
        padding = self.padding() if padded else None
        return MaskSpec(self.scope, attention, self.past, self.length, None, counts_columns, padding)


def kept_rows(chosen: list[list[int]]) -> Selection:
    """The rows that stay, ragged ones filled from the left by the lowest rows that do not."""
    width = max(map(len, chosen))
    rows, valid = [], []
    for row in chosen:
        others = [n for n in range(99) if n not in row][: width - len(row)]
        rows.append(others + row)
        valid.append([False] * len(others) + [True] * len(row))
    ragged = any(len(row) != width for row in chosen)
    return Selection(torch.tensor(rows), torch.tensor(rows), torch.tensor(valid) if ragged else None)


def prefill(scope: AttentionScope, seed: int, padded: bool = False, ragged: bool = False) -> Case:
    """Twelve columns, from the middle of which some were dropped."""
    draw = random.Random(seed)
    starts = [2, 0] if padded else [0, 0]
    chosen = []
    for sample, start in enumerate(starts):
        count = 3 - sample if ragged else 3 + 2 * (padded and sample == 1)
        chosen.append(sorted([start, *draw.sample(range(start + 1, 9), count), 9, 10, 11]))
    if padded:
        chosen[0] = [*range(ragged, 2), *chosen[0]]  # padding that stayed; two columns make the samples equally long
    kept = kept_rows(chosen)
    slots = CacheIndex(kept.rows, kept.valid, 12)
    return Case(scope, 0, 12, starts, slots, kept, kept.rows.shape[1])


def step(scope: AttentionScope, seed: int, padded: bool = False, ragged: bool = False, new: int = 1) -> Case:
    """Some tokens more on a cache of such a prefill."""
    first = prefill(scope, seed, padded, ragged)
    return replace(first, past=12, length=new, slots=first.slots.resized(12 + new), kept=None, count=new)


def further(scope: AttentionScope, seed: int, padded: bool = False, ragged: bool = False) -> Case:
    """A further prefill that drops, on a cache of such a one."""
    first = prefill(scope, seed, padded, ragged)
    kept = kept_rows([[0, 2, 4, 5], [0, 1, 4, 5]])
    slots = first.slots.extended(kept.rows, kept.valid, 12, 6)
    return replace(first, past=12, length=6, slots=slots, kept=kept, count=4)


CALLS: dict[str, Any] = {
    "prefill": prefill,
    "step": step,
    "text": lambda *args: step(*args, new=5),
    "further": further,
}
OPTIONS = [(padded, ragged) for padded in (False, True) for ragged in (False, True)]


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Any:
    return CALLS[request.param]


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, LOWEST)


@pytest.mark.parametrize("scope", SCOPES, ids=lambda scope: scope.kind)
@pytest.mark.parametrize(("padded", "ragged"), OPTIONS)
def test_the_models_own_mask_is_gathered(call: Any, scope: AttentionScope, padded: bool, ragged: bool) -> None:
    for seed in range(8):
        case = call(scope, seed, padded, ragged)
        for mask in (case.full(), additive(case.full())):
            found = follow_mask(mask, case.kept, case.slots, case.count, case.spec())
            assert found is not None
            assert found.dtype == mask.dtype
            case.check(found)


@pytest.mark.parametrize("scope", SCOPES, ids=lambda scope: scope.kind)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_mask_the_layers_rule_is_written_out(
    call: Any, scope: AttentionScope, ragged: bool, attention: str
) -> None:
    """And where it is not, the kernel's own path shows the same: all to one row, the rows before to a square."""
    for seed in range(8):
        case = call(scope, seed, False, ragged)
        found = follow_mask(None, case.kept, case.slots, case.count, case.spec(attention, padded=False))
        if found is not None:
            case.check(found)
            continue
        assert attention == "sdpa"
        width = case.slots.columns.shape[1]
        own = torch.ones(case.count, width, dtype=torch.bool)
        case.check((own if case.count == 1 else own.tril()).expand(len(case.starts), 1, -1, -1))


@pytest.mark.parametrize("kind", ["prefill", "step"])
def test_no_mask_is_made_where_the_kernel_is_right_without(kind: str) -> None:
    case = CALLS[kind](FULL, 0)
    assert follow_mask(None, case.kept, case.slots, case.count, case.spec("sdpa", padded=False)) is None


@pytest.mark.parametrize("kind", ["text", "further"])
def test_a_rectangle_needs_a_mask(kind: str) -> None:
    case = CALLS[kind](FULL, 0)
    assert follow_mask(None, case.kept, case.slots, case.count, case.spec("sdpa", padded=False)) is not None


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
def test_a_window_that_holds_the_whole_sequence_needs_no_mask_and_one_column_less_does(kind: str) -> None:
    for size, needed in ((13, False), (12, False), (11, True)):
        case = prefill(AttentionScope(kind, size), 0)
        found = follow_mask(None, case.kept, case.slots, case.count, case.spec("sdpa", padded=False))
        assert (found is not None) == needed
        if found is not None:
            case.check(found)


def test_eager_attention_always_needs_a_mask() -> None:
    case = prefill(FULL, 0)
    assert follow_mask(None, case.kept, case.slots, case.count, case.spec("eager", padded=False)) is not None


@pytest.mark.parametrize("scope", SCOPES, ids=lambda scope: scope.kind)
@pytest.mark.parametrize(("padded", "ragged"), OPTIONS)
def test_a_mask_that_counts_slots_is_not_believed(scope: AttentionScope, padded: bool, ragged: bool) -> None:
    """The model measured it by a cache from which tokens were dropped: too narrow, and wrong before this call."""
    for seed in range(8):
        for case in (step(scope, seed, padded, ragged), step(scope, seed, padded, ragged, 5)):
            narrow = case.full()[..., 4:].clone()
            narrow[..., : -case.length] = True
            for mask in (narrow, additive(narrow)):
                found = follow_mask(mask, case.kept, case.slots, case.count, case.spec("eager", counts_columns=False))
                assert found is not None
                assert found.dtype == mask.dtype
                case.check(found)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_windowed_cache_hands_out_its_last_columns_and_its_mask_is_as_wide(ragged: bool) -> None:
    """The model's mask counts the last columns; the cache holds the last slots, which go further back."""
    scope = AttentionScope("sliding", 6)
    for seed in range(8):
        case = step(scope, seed, ragged=ragged)
        held = case.slots
        case.slots = CacheIndex(held.columns[:, -6:], None if held.valid is None else held.valid[:, -6:], 13)
        assert bool((case.slots.columns < 7).any()), "nothing further back than the mask"
        found = follow_mask(case.full()[..., -6:], None, case.slots, 1, case.spec())
        assert found is not None
        case.check(found)


# --- Other shapes ---------------------------------------------------------------------------------------------------


def test_a_static_cache_is_as_wide_as_it_is() -> None:
    case = prefill(FULL, 0)
    spec = replace(case.spec("eager"), width=20)
    for mask in (case.full(), additive(case.full()), None):
        found = follow_mask(mask, case.kept, case.slots, case.count, spec)
        assert found is not None
        width = case.slots.columns.shape[1]
        assert found.shape[-1] == 20
        assert not bool((found[..., width:] >= 0).any() if found.is_floating_point() else found[..., width:].any())
        case.check(found[..., :width])


def test_flash_kernels_get_who_is_there() -> None:
    case = prefill(FULL, 0, padded=True, ragged=True)
    there = (case.padding().gather(1, case.slots.columns) > 0) & case.slots.alive
    for mask, padded, wanted in ((case.padding(), True, there), (None, False, case.slots.alive)):
        spec = case.spec("flash_attention_2", padded=padded)
        found = follow_mask(mask, case.kept, case.slots, case.count, spec)
        assert found is not None
        assert found.bool().tolist() == wanted.tolist()


def test_flash_kernels_need_nothing_where_all_are_there() -> None:
    case = prefill(FULL, 0)
    spec = case.spec("flash_attention_2", padded=False)
    assert follow_mask(None, case.kept, case.slots, case.count, spec) is None


def test_half_precision_hides_by_its_own_lowest_number() -> None:
    case = prefill(FULL, 0, ragged=True)
    mask = torch.zeros(case.full().shape, dtype=torch.bfloat16).masked_fill(
        ~case.full(), torch.finfo(torch.bfloat16).min
    )
    found = follow_mask(mask, case.kept, case.slots, case.count, case.spec("eager"))
    assert found is not None
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())
    case.check(additive(found >= 0))


def test_rows_of_filler_see_themselves() -> None:
    case = prefill(FULL, 1, ragged=True)
    assert case.kept is not None
    assert case.kept.valid is not None
    nothing = torch.zeros_like(case.full())
    found = follow_mask(nothing, case.kept, case.slots, case.count, case.spec())
    assert found is not None
    filler = ~case.kept.valid
    assert torch.equal(found[:, 0].any(-1), filler)
    assert torch.equal(found[:, 0].diagonal(dim1=-2, dim2=-1), filler)


def test_rows_of_filler_see_themselves_behind_a_cache_too() -> None:
    first = prefill(FULL, 1)
    kept = kept_rows([[0, 2, 4, 5], [0, 4, 5]])
    slots = first.slots.extended(kept.rows, kept.valid, 12, 6)
    case = replace(first, past=12, length=6, slots=slots, kept=kept, count=4)
    found = follow_mask(torch.zeros_like(case.full()), kept, slots, 4, case.spec())
    assert found is not None
    assert kept.valid is not None
    own = found[:, 0, :, -4:]
    assert torch.equal(own.diagonal(dim1=-2, dim2=-1), ~kept.valid)
    assert torch.equal(found.sum(-1)[:, 0], (~kept.valid).long())


# --- Recurrent layers -----------------------------------------------------------------------------------------------


def test_a_recurrent_layer_is_told_of_padding_and_filler() -> None:
    kept = Selection(
        torch.tensor([[1, 3], [0, 2]]), torch.tensor([[1, 3], [0, 2]]), torch.tensor([[True] * 2, [False, True]])
    )
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert follow_recurrent_mask(padding, kept).tolist() == [[0, 1], [0, 1]]
    assert follow_recurrent_mask(None, kept).tolist() == [[1, 1], [0, 1]]
    whole = replace(kept, valid=None)
    assert follow_recurrent_mask(padding, whole).tolist() == [[0, 1], [1, 1]]
    assert follow_recurrent_mask(None, whole) is None
    assert follow_recurrent_mask(padding, None) is padding
