"""How an engine is asked to drop, as far as no vLLM is needed for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyramiddrop import FastV, PyramidDrop, RandomDrop
from pyramiddrop.methods import Downsample, VisionDrop
from pyramiddrop.scoring import SCORERS
from pyramiddrop.vllm import hf_overrides, rules
from pyramiddrop.vllm.rules import configure, rules_of


def checkpoint(folder: Path, architecture: str | None = "LlavaForConditionalGeneration") -> str:
    config = {"model_type": "llava"} | ({"architectures": [architecture]} if architecture else {})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def configuration(overrides: Any = None, additional: Any = None, layers: int = 8) -> Any:
    """As much of vLLM's configuration as the settings are read from."""
    hf_config = SimpleNamespace() if overrides is None else SimpleNamespace(pyramiddrop=overrides)
    text = SimpleNamespace(num_hidden_layers=layers)
    model = SimpleNamespace(hf_config=hf_config, hf_text_config=text, model="nowhere", revision=None)
    return SimpleNamespace(model_config=model, additional_config=additional or {})


@pytest.fixture(autouse=True)
def no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_saved", lambda model_config: None)


def test_overrides_name_the_architecture_and_the_method(tmp_path: Path) -> None:
    overrides = hf_overrides(checkpoint(tmp_path), PyramidDrop(lam=0.6))
    assert overrides["architectures"] == ["PyramidDropLlavaForConditionalGeneration"]
    assert overrides["pyramiddrop"]["lam"] == 0.6
    assert hf_overrides(checkpoint(tmp_path)) == {"architectures": overrides["architectures"]}
    json.dumps(overrides)


def test_an_architecture_that_is_not_served_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot serve LlamaForCausalLM"):
        hf_overrides(checkpoint(tmp_path, "LlamaForCausalLM"))
    with pytest.raises(ValueError, match="names no architecture"):
        hf_overrides(checkpoint(tmp_path, None))


def settled(config: Any) -> Any:
    configure(config)
    return rules_of(config)


def test_without_settings_the_paper_s_method_is_served() -> None:
    assert settled(configuration()).schedule == PyramidDrop().schedule(8)


def test_settings_come_from_overrides_from_additional_config_or_from_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled(configuration({"lam": 0.6})).schedule.keep == pytest.approx((0.6, 0.36, 0.216))
    assert settled(configuration(None, {"pyramiddrop": {"stages": 2}})).schedule.layers == (4,)
    monkeypatch.setattr(rules, "_saved", lambda model_config: FastV(layer=3).settings())
    assert settled(configuration()).rank_layer == "last"
    assert settled(configuration({"lam": 0.6})).rank_layer == "next"


def test_what_is_settled_can_be_settled_again() -> None:
    config = configuration({"lam": 0.6})
    configure(config)
    configure(config)
    assert rules_of(config).schedule.keep == pytest.approx((0.6, 0.36, 0.216))


def test_what_is_settled_reaches_the_other_processes_as_plain_values() -> None:
    config = configuration(PyramidDrop(layers=[2, 5], keep=[0.5, 0.2]).settings(), {"other": 1})
    configure(config)
    sent = json.loads(json.dumps(config.additional_config))
    assert sent["other"] == 1
    assert rules_of(configuration(None, sent)).schedule.layers == (2, 5)


@pytest.mark.parametrize(
    ("overrides", "additional", "message"),
    [
        ({"lam": 2}, None, "lam must be a number"),
        ({"layer": 2}, None, r"hf_overrides\['pyramiddrop'\]: .*layer"),
        ("0.5", None, "must hold a JSON object"),
        ({"lam": 0.5}, {"pyramiddrop": {"lam": 0.6}}, "differ"),
        ({"layers": [3, 9], "keep": [0.5, 0.2]}, None, "layers must be in 1..7"),
        (PyramidDrop(positions="compact").settings(), None, "positions='compact' cannot be served"),
        (RandomDrop(seed=None).settings(), None, "give it a seed"),
        (PyramidDrop(merge=True).settings(), None, "merge=True cannot be served"),
        (PyramidDrop(per_frame=True).settings(), None, "per_frame=True cannot be served; use per_image=True"),
        (VisionDrop().settings(), None, "VisionDrop cannot be served: it drops before the decoder"),
        (
            (VisionDrop() | PyramidDrop(lam=0.4)).settings(),
            None,
            r"Compose cannot be served: it drops before the decoder; PyramidDrop\(lam=0.4\) alone can be",
        ),
        (Downsample().settings(), None, "Downsample cannot be served: it drops before the decoder"),
        (None, {"pyramiddrop": PyramidDrop(merge=True).settings()}, "merge=True cannot be served"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(overrides: Any, additional: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(configuration(overrides, additional))


SERVED = {"attention", "debiased", "diversity", "random", "top_heads", "uniform"}


@pytest.mark.parametrize("around", [{}, {"reserve": 0.5}, {"random_from": 4}, {"reserve": 0.5, "random_from": 4}])
@pytest.mark.parametrize("name", sorted(set(SCORERS) - {"vision"}))
def test_a_scorer_is_served_or_refused_by_name(name: str, around: dict[str, Any]) -> None:
    """Also where it stands inside another. A new scorer is refused until somebody has seen it served."""
    config = configuration(PyramidDrop(score=name, **around).settings())
    if name in SERVED:
        assert settled(config).scorer == PyramidDrop(score=name, **around).scorer()
        return
    allowed = ", ".join(other for other in SCORERS if other in SERVED)
    with pytest.raises(ValueError, match=f"{SCORERS[name].__name__} cannot be served; score must be one of {allowed}$"):
        configure(config)
