"""From a budget to a schedule: never more than the budget, as near as a search of all finds, and a line that runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramiddrop import PyramidDrop, VisionDrop
from pyramiddrop.cost import (
    PRESETS,
    DecoderShape,
    DropCounts,
    Experts,
    ModelShape,
    Prompt,
    estimate_cost,
    grouped_attention,
)
from pyramiddrop.cost.model_sizes import model_shape
from pyramiddrop.hf.versions import output_cache
from pyramiddrop.inference import InputError
from pyramiddrop.inference.timing import LayerProfiler
from pyramiddrop.planning import PYRAMIDS, Before, Budget, InfeasibleBudgetError, Plan, Profile, plan
from pyramiddrop.schedule import PreLLMSchedule, Schedule, powers
from tiny import make_batch, tiny_model

SHAPE = ModelShape(DecoderShape(layers=8, hidden=64, intermediate=176, heads=4, kv_heads=2, head_dim=16))
#: The last layer attends to the keys of layer 2, behind which tokens may be dropped twice.
SHARED = ModelShape(
    replace(
        SHAPE.decoder,
        mixers=(grouped_attention(64, 4, 2, 16),) * 7 + (grouped_attention(64, 4, 2, 16, source=2),),
    )
)
SHAPES = {"plain": SHAPE, "shared keys": SHARED}
PROMPT = Prompt(30, 12)
LLAVA = PRESETS["llava-1.5-7b"].shape
CELLS = [
    {"layer": layer, "keep": keep, "accuracy": accuracy}
    for (layer, keep), accuracy in {
        (1, 0.75): 0.70,
        (1, 0.5): 0.60,
        (1, 0.25): 0.30,
        (3, 0.75): 0.79,
        (3, 0.5): 0.71,
        (3, 0.25): 0.55,
        (6, 0.75): 0.81,  # noise: better than vanilla
        (6, 0.5): 0.78,
        (6, 0.25): 0.79,  # noise: better than with more tokens
    }.items()
]
PROFILE = {"num_layers": 8, "vanilla": 0.8, "cells": CELLS}


class LinearClock:
    """A millisecond for each ten rows of a layer, and for each hundred that are ranked."""

    def layer(self, rows: int) -> float:
        return rows / 10

    def ranking(self, rows: int) -> float:
        return rows / 100


def budgets_of(schedule: Schedule | None, prompt: Prompt = PROMPT, shape: ModelShape = SHAPE) -> dict[str, Any]:
    """What each kind of budget would have to be to afford `schedule` exactly, by the account and not by the planner."""
    cost, vanilla = estimate_cost(shape, prompt, schedule), estimate_cost(shape, prompt)
    return {
        "tokens": cost.average_tokens,
        "kv_bytes": cost.kv_bytes,
        "tflops full": cost.full.total / 1e12,
        "tflops paper": cost.paper / 1e12,
        "percent full": 100 * cost.full.total / vanilla.full.total,
        "percent fastv": 100 * cost.fastv / vanilla.fastv,
    }


KINDS = tuple(budgets_of(None))


def budget_of(kind: str, limit: float) -> Budget:
    name, _, convention = kind.partition(" ")
    return Budget(**{name: limit}, convention=convention or "full")


def equal(lam: float, stages: int) -> Schedule:
    return Schedule.equal(8, stages, powers(lam, stages - 1))


# ---- against a search of all schedules


def all_lams(stages: int) -> Iterator[float]:
    """A λ for each way in which the counts of 30 tokens can come out, and many more."""
    yield from (number / 2000 for number in range(1, 2001))
    yield from ((count / 30) ** (1 / power) for power in range(1, stages) for count in range(1, 31))


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("stages", [2, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_lambda_is_the_best_of_all(kind: str, stages: int) -> None:
    spent = sorted({budgets_of(equal(lam, stages))[kind] for lam in all_lams(stages)})
    cheapest, vanilla = spent[0], budgets_of(None)[kind]
    # The ranking makes a schedule that keeps nearly all as dear as vanilla; a budget up there has no one best λ.
    for limit in (cheapest + share * (0.9 * vanilla - cheapest) for share in (0, 0.1, 0.33, 0.5, 0.77, 1)):
        found = plan(SHAPE, PROMPT, budget_of(kind, limit), stages=stages)
        assert found.spent == pytest.approx(budgets_of(found.schedule)[kind])
        assert found.spent <= limit
        assert found.spent == pytest.approx(max(value for value in spent if value <= limit))


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_that_a_schedule_spends_exactly_finds_it(kind: str) -> None:
    found = plan(SHAPE, PROMPT, budget_of(kind, budgets_of(equal(0.5, 4))[kind] * (1 + 1e-12)), stages=4)
    assert found.schedule.counts(30) == [15, 7, 3]
    assert found.arguments == {"lam": 0.5, "stages": 4}  # the shortest number that keeps as many


@pytest.mark.parametrize("lam", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_stages_is_the_best_of_all(kind: str, lam: float) -> None:
    spent = {stages: budgets_of(equal(lam, stages))[kind] for stages in range(2, 9)}
    for limit in [*spent.values(), 1.01 * min(spent.values())]:
        found = plan(SHAPE, PROMPT, budget_of(kind, limit * (1 + 1e-12)), lam=lam)
        assert found.arguments["lam"] == lam
        assert spent[found.arguments["stages"]] == max(value for value in spent.values() if value <= limit)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_gives_the_least_loss_of_all(kind: str, sizes: str) -> None:
    profile, shape = Profile.from_dict(PROFILE), SHAPES[sizes]
    ways = list(all_schedules(profile))
    spent = [(budgets_of(schedule, shape=shape)[kind], predicted_loss(profile, schedule)) for schedule in ways]
    cheapest, dearest = min(spent)[0], budgets_of(None, shape=shape)[kind]
    for limit in (cheapest + share * (dearest - cheapest) for share in (0, 0.05, 0.2, 0.4, 0.6, 0.8, 1)):
        found = plan(shape, PROMPT, budget_of(kind, limit * (1 + 1e-12)), profile=profile)
        least = min(loss for value, loss in spent if value <= limit)
        assert found.loss == pytest.approx(least)
        assert predicted_loss(profile, found.schedule) == pytest.approx(least)
        assert found.spent <= limit * (1 + 1e-12)
        assert found.spent == pytest.approx(min(value for value, loss in spent if loss <= least + 1e-12))


@pytest.mark.parametrize("fixed", [{"lam": 0.95}, {"profile": Profile.from_dict(PROFILE)}], ids=["lam", "profile"])
def test_where_ranking_is_dear_it_is_part_of_the_budget(fixed: dict[str, Any]) -> None:
    wordy = Prompt(20, 2000)  # ranking 2000 rows of text costs more than dropping a token or two saves
    ways = [equal(0.95, stages) for stages in range(2, 9)] if "lam" in fixed else list(all_schedules(fixed["profile"]))
    spent = [budgets_of(schedule, wordy)["percent full"] for schedule in ways]
    for limit in (value * (1 + share) for value in spent for share in (-1e-9, 1e-9)):
        if limit < min(spent):
            continue
        found = plan(SHAPE, wordy, Budget(percent=limit), **fixed)
        assert budgets_of(found.schedule, wordy)["percent full"] <= limit
        if "lam" in fixed:
            assert found.spent == pytest.approx(max(value for value in spent if value <= limit), rel=1e-12)


def all_schedules(profile: Profile) -> Iterator[Schedule]:
    """Every falling choice of a share for each layer of the profile."""
    for shares in itertools.combinations_with_replacement(profile.keep, len(profile.layers)):
        yield Schedule.of(profile.layers, shares)


def predicted_loss(profile: Profile, schedule: Schedule) -> float:
    """The sum over drops of what one drop to the new share loses more than one to the share before."""
    total, before = 0.0, 1.0
    for stage in schedule.stages:
        total += profile.losses[stage.layer, stage.keep] - profile.losses[stage.layer, before]
        before = stage.keep
    return total


# ---- λ and stages together


@pytest.mark.parametrize(("tokens", "stages"), [(270, 4), (192, 5)])
def test_budgets_that_equal_stages_reach(tokens: int, stages: int) -> None:
    found = plan(LLAVA, Prompt(576, 64), Budget(tokens=tokens))
    assert (found.pyramid, found.arguments["stages"]) == ("equal", stages)
    assert found.arguments["lam"] >= 0.4
    assert tokens - 0.2 <= found.spent <= tokens
    assert found.cost.average_tokens == found.spent
    if stages > 4:  # and no fewer would do
        assert plan(LLAVA, Prompt(576, 64), Budget(tokens=tokens), stages=stages - 1).arguments["lam"] < 0.4


@pytest.mark.parametrize(("tokens", "counts"), [(128, [317, 174, 96, 52]), (64, [190, 63, 21, 6])])
def test_tighter_ones_drop_earlier_and_no_oftener(tokens: int, counts: list[int]) -> None:
    prompt, budget = Prompt(576, 64), Budget(tokens=tokens)
    found = plan(LLAVA, prompt, budget)
    assert (found.pyramid, found.schedule.layers) == ("concave", (2, 4, 8, 16))
    assert found.schedule.counts(576) == counts
    assert tokens - 0.5 <= found.spent <= tokens
    assert plan(LLAVA, prompt, budget, pyramid="concave") == found
    with suppress(InfeasibleBudgetError):
        assert plan(LLAVA, prompt, budget, pyramid="equal").arguments["lam"] < 0.4


def test_the_tightest_begin_before_the_second_layer() -> None:
    preset = PRESETS["llava-next-7b"]
    found = plan(preset.shape, Prompt(2880, 64), Budget(tokens=160))
    assert (found.pyramid, found.schedule.layers) == ("concave", (1, 2, 4, 8))
    assert 159.5 < found.spent <= 160


@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_pyramid_is_the_best_of_all_lambdas(kind: str, pyramid: str) -> None:
    layers = {
        "equal": [[2, 4, 6], [1, 3, 4, 6]],
        "concave": [[1, 2, 4]],
        "single": [[2]],
        "hidrop": [[1, 2, 3, 4, 6]],
    }[pyramid]
    for drops in layers:
        exits = [0.0] if pyramid == "hidrop" else []
        falling = len(drops) - len(exits)
        ways = (Schedule.of(drops, [*powers(lam, falling), *exits]) for lam in all_lams(falling + 1))
        spent = [budgets_of(way)[kind] for way in ways]
        limit = (min(spent) + budgets_of(None)[kind]) / 2
        found = plan(SHAPE, PROMPT, budget_of(kind, limit), pyramid=pyramid)
        if list(found.schedule.layers) == drops:
            assert found.spent == pytest.approx(max(value for value in spent if value <= limit))
            return
    raise AssertionError(f"{found.line} drops before other layers than {layers}")


def test_the_layers_of_hidrop_are_those_of_the_paper_and_scale_with_the_depth() -> None:
    found = plan(LLAVA, Prompt(576, 64), Budget(tokens=240), pyramid="hidrop")
    assert found.schedule.layers == (10, 14, 16, 18, 25)
    assert found.schedule.keep[-1] == 0
    assert found.cost.visual_by_layer[25:] == (0,) * 7
    assert all(len(str(ratio)) <= 7 for ratio in found.schedule.keep)
    qwen = PRESETS["qwen2.5-vl-7b"]  # 28 layers
    assert plan(qwen.shape, Prompt(1296, 64), Budget(tokens=600), pyramid="hidrop").schedule.layers == (
        9,
        12,
        14,
        16,
        22,
    )
    shallow = ModelShape(replace(SHAPE.decoder, layers=5))
    with pytest.raises(ValueError, match=r"HiDrop's 5 drops need as many layers; this model allows \[1, 2, 3, 4\]"):
        plan(shallow, PROMPT, Budget(percent=50), pyramid="hidrop")


HALF = VisionDrop(keep=0.5)
BEFORE = Before(PreLLMSchedule.keeping(0.5), repr(HALF), HALF.ranking_flops)


@pytest.mark.parametrize(
    "fixed",
    [{}, {"stages": 4}, {"lam": 0.5}, {"pyramid": "concave"}, {"pyramid": "single"}, {"pyramid": "hidrop"}],
    ids=str,
)
@pytest.mark.parametrize("budget", [Budget(tokens=100), Budget(kv_bytes=9e7), Budget(tflops=2.5)], ids=str)
def test_behind_a_drop_before_the_decoder_it_is_the_plan_of_what_that_leaves(budget: Budget, fixed: Any) -> None:
    """Half of 576 tokens, and 288 tokens: the same picture for the tower, the same layers, the same budget."""
    behind = outcome(Prompt(576, 64, crops=1), budget, before=BEFORE, **fixed)
    alone = outcome(Prompt(288, 64, crops=1), budget, **fixed)
    assert behind.arguments == alone.arguments
    assert behind.cost == alone.cost
    assert behind.line == f"VisionDrop() | {alone.line}"
    inside = PyramidDrop(**alone.arguments)
    assert (HALF | inside).schedule(32) == behind.schedule


def outcome(prompt: Prompt, budget: Budget, **given: Any) -> Plan:
    """The plan, or the nearest one where the budget is out of reach."""
    try:
        return plan(LLAVA, prompt, budget, **given)
    except InfeasibleBudgetError as error:
        return error.nearest


def test_what_ranks_before_the_decoder_is_part_of_the_budget() -> None:
    """Diversity compares all rows with each other: a budget that random tokens spend exactly is then too small."""
    prompt, dear = Prompt(576, 64), VisionDrop(score="diversity")
    behind = {
        name: Before(PreLLMSchedule.keeping(0.5), repr(method), method.ranking_flops)
        for name, method in {"dear": dear, "cheap": VisionDrop(score="random")}.items()
    }
    budget = Budget(percent=plan(LLAVA, prompt, Budget(percent=30), before=behind["cheap"], stages=4).spent)
    lams = {name: plan(LLAVA, prompt, budget, before=one, stages=4) for name, one in behind.items()}
    assert lams["dear"].arguments["lam"] < lams["cheap"].arguments["lam"]
    cost = lams["dear"].cost
    drop = DropCounts(0, 640, 576, 288, instruction=64)
    assert cost.full.ranking == dear.ranking_flops(LLAVA.decoder, drop) + lams_inside(lams["dear"])


def lams_inside(found: Plan) -> int:
    """What ranking inside the decoder costs."""
    schedule = PyramidDrop(**found.arguments).schedule(32)
    return estimate_cost(LLAVA, Prompt(288, 64), schedule).full.ranking


def test_a_budget_for_everything_drops_nothing() -> None:
    assert plan(SHAPE, PROMPT, Budget(percent=100)).arguments == {"lam": 1.0, "stages": 4}
    costly = {"num_layers": 8, "cells": [{"layer": 2, "keep": 0.5, "agreement": 0.9}]}
    found = plan(SHAPE, PROMPT, Budget(tokens=30), profile=Profile.from_dict(costly))
    assert (found.schedule.counts(30), found.loss) == ([30], 0.0)


def test_a_profile_drops_what_costs_nothing_even_below_the_budget() -> None:
    found = plan(SHAPE, PROMPT, Budget(tokens=30), profile=Profile.from_dict(PROFILE))
    assert (found.arguments, found.loss) == ({"layers": [6], "keep": [0.75]}, 0.0)


# ---- out of reach


def test_the_nearest_is_named() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan(LLAVA, Prompt(576, 64), Budget(tokens=64), stages=4)
    nearest = caught.value.nearest
    assert nearest.spent == (8 * 576 + 24) / 32  # one token is always left
    assert "an average of 64 visual tokens is out of reach of 4 equal stages" in str(caught.value)
    assert f"144.75 visual tokens, by {nearest.line}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert plan(LLAVA, Prompt(576, 64), Budget(tokens=nearest.spent), stages=4).spent == nearest.spent


@pytest.mark.parametrize("fixed", [{"lam": 0.5}, {"stages": 3}, {"profile": Profile.from_dict(PROFILE)}, {}])
def test_the_nearest_is_the_cheapest_of_its_kind(fixed: dict[str, Any]) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan(SHAPE, PROMPT, Budget(kv_bytes=10), **fixed)
    spent = caught.value.nearest.spent
    assert plan(SHAPE, PROMPT, Budget(kv_bytes=spent), **fixed).spent == spent
    with pytest.raises(InfeasibleBudgetError):
        plan(SHAPE, PROMPT, Budget(kv_bytes=spent - 1), **fixed)


# ---- what comes out


@pytest.mark.parametrize("fixed", [{}, {"lam": 0.6}, {"stages": 5}, {"profile": Profile.from_dict(PROFILE)}])
def test_the_line_makes_the_method_that_reaches_the_budget(fixed: dict[str, Any]) -> None:
    model = tiny_model("llava-gqa")
    inputs = make_batch(model, [[7, "image", "image", 9]])
    shape = model_shape(model.config, bytes_per_value=4)
    vanilla = estimate_cost(shape, Prompt(32, 16))
    found = plan(shape, Prompt(32, 16), Budget(kv_bytes=0.7 * vanilla.kv_bytes), **fixed)
    method = eval(found.line, {"PyramidDrop": PyramidDrop})
    assert method == PyramidDrop(**found.arguments)
    assert method.schedule(8) == found.schedule
    with method(model) as trace, torch.no_grad():
        cache = output_cache(model(**inputs, use_cache=True))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == found.spent <= 0.7 * vanilla.kv_bytes
    assert trace.cost().flops == found.cost.full.decoder + found.cost.full.ranking


def test_the_dictionary_is_json_and_complete() -> None:
    found = plan(LLAVA, Prompt(576, 64), Budget(percent=50, convention="paper"))
    read = json.loads(json.dumps(found.as_dict()))
    assert read["budget"] == {"kind": "percent", "limit": 50.0, "convention": "paper"}
    assert read["flops_ratio"]["paper"] == pytest.approx(found.spent / 100)
    assert [stage["tokens"] for stage in read["stages"]] == found.schedule.counts(576)
    assert read["python"] == found.line
    assert read["vanilla_spent"] == 100
    assert set(read["cost"]["flops"]) == {"full", "paper", "fastv"}


# ---- milliseconds


def test_milliseconds_are_sums_over_layers_and_rankings() -> None:
    found = plan(SHAPE, PROMPT, Budget(milliseconds=20, clock=LinearClock()), stages=4)
    visual = found.cost.visual_by_layer
    rankings = (30, visual[2], visual[4])
    by_hand = sum(count + 12 for count in visual) / 10 + sum(count + 12 for count in rankings) / 100
    assert found.spent == pytest.approx(by_hand)
    assert 19.5 < found.spent <= 20
    assert found.vanilla_spent == pytest.approx(8 * 4.2)


def test_a_layer_is_timed_on_this_machine() -> None:
    shape = DecoderShape(layers=4, hidden=128, intermediate=352, heads=4, kv_heads=2, head_dim=32)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    clock = LayerProfiler(shape)
    few, many, ranking = clock.layer(32), clock.layer(2048), clock.ranking(2048)
    assert torch.equal(torch.rand(2), expected)
    assert 0 < few < many
    assert 0 < ranking < many
    assert (clock.layer(32), clock.ranking(2048)) == (few, ranking)  # measured once
    limit = 0.7 * 4 * many
    found = plan(ModelShape(shape), Prompt(2016, 32), Budget(milliseconds=limit, clock=clock), lam=0.5)
    assert found.spent <= limit
    assert found.vanilla_spent == pytest.approx(4 * many)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (DecoderShape(2, 64, 96, 4, 4, 16, experts=Experts(4, 2, 32)), "mixture of experts"),
        (DecoderShape(2, 64, 96, 4, 4, 16, matrices=2), "layers that differ from Llama's"),
        (SHARED.decoder, "layers that differ from Llama's"),
    ],
)
def test_what_is_not_timed(shape: DecoderShape, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LayerProfiler(shape)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of tokens"),
        ({"tokens": 5, "percent": 5}, "got tokens, percent"),
        ({"tokens": 0}, "tokens must be positive"),
        ({"percent": float("nan")}, "percent must be positive"),
        ({"percent": 5, "convention": "true"}, "convention"),
        ({"milliseconds": 5}, "clock"),
        ({"tokens": 5, "clock": LinearClock()}, "clock"),
    ],
)
def test_bad_budgets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": 0.5, "stages": 4}, "at most one of lam, stages, pyramid, profile"),
        ({"lam": 1.5}, "lam"),
        ({"stages": 1}, "stages"),
        ({"stages": 9}, "stages"),
        ({"profile": Profile.from_dict(PROFILE | {"num_layers": 9})}, "9 layers; this one has 8"),
        ({"profile": Profile.from_dict(PROFILE), "before": BEFORE}, "give before or profile, not both"),
    ],
)
def test_bad_questions(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(SHAPE, PROMPT, Budget(percent=50), **arguments)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "JSON object"),
        ({"cells": CELLS, "vanilla": 1}, "'num_layers' is missing"),
        ({"num_layers": 8, "vanilla": 1}, "'cells' is missing"),
        ({"num_layers": 8, "vanilla": 1, "cells": []}, "no cells"),
        ({"num_layers": 8, "cells": CELLS}, "'vanilla' is missing"),
        ({"num_layers": 6, "vanilla": 1, "cells": CELLS}, r"layers must be in 1\.\.5"),
        ({"num_layers": 8, "vanilla": 1, "cells": CELLS[1:]}, "layer 1 has none for keep 0.75"),
        ({"num_layers": 8, "vanilla": 1, "cells": [{"layer": 1, "keep": 1.5, "accuracy": 1}]}, "keep"),
        ({"num_layers": 8, "vanilla": 1, "cells": [{"layer": 1, "keep": 0.5}]}, "agreement or accuracy"),
    ],
)
def test_bad_profiles(tmp_path: Path, found: Any, message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"profile.json is no redundancy profile: .*{message}"):
        Profile.read(path)


def test_agreement_is_measured_against_one() -> None:
    cells = [{"layer": 2, "keep": 0.5, "agreement": 0.9}]
    profile = Profile.from_dict({"num_layers": 8, "cells": cells})
    assert profile.loss(2, 1.0, 0.5) == pytest.approx(0.1)


def test_noise_buys_nothing() -> None:
    profile = Profile.from_dict(PROFILE)
    assert profile.losses[6, 0.75] == 0  # better than vanilla is no gain
    assert profile.losses[6, 0.25] == profile.losses[6, 0.5]  # fewer tokens are never better than more
