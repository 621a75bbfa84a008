"""When and how much: counts as the official code counts them, the paper's stages, and every refusal."""

from __future__ import annotations

import pytest

from pyramiddrop.schedule import Schedule, Stage, equal_stage_layers, powers


@pytest.mark.parametrize(
    ("tokens", "keep", "count"),
    [
        (100, 0.29, 28),  # the float product is 28.999999999999996
        (576, 0.5, 288),
        (576, 0.125, 72),
        (5, 0.5, 2),
        (7, 1.0, 7),
        (3, 0.125, 1),  # never none
        (1, 0.01, 1),
        (0, 0.5, 0),
        (576, 0.0, 0),  # early exit
        (576, 1e-9, 1),
    ],
)
def test_count_is_the_floor_of_the_float_product_and_at_least_one(tokens: int, keep: float, count: int) -> None:
    assert Stage(8, keep).count(tokens) == count


def test_counts_are_of_the_original_number() -> None:
    schedule = Schedule.of([8, 16, 24], [0.5, 0.25, 0.125])
    assert schedule.counts(576) == [288, 144, 72]
    assert schedule.counts(11) == [5, 2, 1]


@pytest.mark.parametrize(
    ("num_layers", "stages", "layers"),
    [
        (32, 4, [8, 16, 24]),
        (24, 4, [6, 12, 18]),
        (28, 4, [7, 14, 21]),
        (8, 4, [2, 4, 6]),
        (40, 4, [10, 20, 30]),
        (32, 2, [16]),
        (4, 4, [1, 2, 3]),
    ],
)
def test_equal_stages(num_layers: int, stages: int, layers: list[int]) -> None:
    assert equal_stage_layers(num_layers, stages) == layers


def test_powers_of_lambda() -> None:
    assert powers(0.5, 3) == [0.5, 0.25, 0.125]
    assert powers(1.0, 2) == [1.0, 1.0]


def test_stage_of_counts_the_drops_behind_a_layer() -> None:
    schedule = Schedule.of([2, 4], [0.5, 0.25])
    assert [schedule.stage_of(layer) for layer in range(6)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("layers", "keep", "message"),
    [
        ([], [], "stage"),
        ([2, 4], [0.5], "layers and keep"),
        ([0, 4], [0.5, 0.25], "layers"),
        ([-1], [0.5], "layers"),
        ([4, 4], [0.5, 0.25], "layers"),
        ([4, 2], [0.5, 0.25], "layers"),
        ([2.0], [0.5], "layers"),
        ([True], [0.5], "layers"),
        ([2, 4], [0.25, 0.5], "keep"),
        ([2, 4], [0.0, 0.0], r"must be the last; got \[0.0, 0.0\]. Leave out the 1 drops behind it: keep=\[0.0\]"),
        ([2, 4, 6], [0.5, 0, 0], r"keep=\[0.5, 0\], and the first 2 of the layers"),
        ([2], [1.5], "keep"),
        ([2], [-0.5], "keep"),
        ([2], [float("nan")], "keep"),
        ([2], ["half"], "keep"),
        ([2], [True], "keep"),
    ],
)
def test_bad_schedules_name_the_argument(layers: list, keep: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.of(layers, keep)


def test_equal_keep_ratios_and_keep_one_are_allowed() -> None:
    assert Schedule.of([2, 4], [1.0, 1.0]).counts(9) == [9, 9]


@pytest.mark.parametrize(("num_layers", "stages"), [(8, 1), (8, 0), (3, 4)])
def test_bad_stages(num_layers: int, stages: int) -> None:
    with pytest.raises(ValueError, match="stages"):
        equal_stage_layers(num_layers, stages)


@pytest.mark.parametrize(
    ("num_layers", "stages", "allowed", "expected"),
    [
        (32, 4, list(range(1, 32)), [8, 16, 24]),
        (34, 4, [5, 11, 17, 23, 29], [5, 17, 23]),  # Gemma 3 4B; equal stages would end at 8, 17 and 25
        (8, 3, [3, 7], [3, 7]),  # equal: 2 and 5
        (16, 4, [6, 10], None),
        (16, 4, [13, 14, 15], [13, 14, 15]),  # each as near as those behind it leave room for
        (16, 4, [1, 2, 3], [1, 2, 3]),
        (16, 3, [3, 7, 11, 15], [3, 11]),  # equal: 5 and 10; 3 and 7 are as near to 5, and the lower is taken
        (16, 2, [6, 10], [6]),  # equal: 8, as near to both
    ],
)
def test_stages_end_where_the_model_allows_it(
    num_layers: int, stages: int, allowed: list[int], expected: list[int] | None
) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"4 stages need 3 layers to drop before; this model allows \[6, 10\]"):
            equal_stage_layers(num_layers, stages, allowed)
    else:
        assert equal_stage_layers(num_layers, stages, allowed) == expected


def test_every_layer_allowed_is_no_restriction() -> None:
    for layers in range(4, 40):
        for stages in range(2, 5):
            free = equal_stage_layers(layers, stages)
            assert equal_stage_layers(layers, stages, range(1, layers)) == free


@pytest.mark.parametrize("lam", [0, -0.5, 1.5, float("nan")])
def test_bad_lambda(lam: float) -> None:
    with pytest.raises(ValueError, match="lam"):
        powers(lam, 3)


def test_layers_beyond_the_model() -> None:
    schedule = Schedule.of([2, 8], [0.5, 0.25])
    schedule.check_depth(9)
    with pytest.raises(ValueError, match=r"layers.*8 layers"):
        schedule.check_depth(8)
