"""The pruning configuration of an engine and of its requests: how it is read, checked and stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pyramiddrop.methods import FILE_NAME, Compose, Method, PreLLMMethod, PyramidDrop, RandomDrop
from pyramiddrop.schedule import Schedule, powers
from pyramiddrop.scoring import (
    SCORERS,
    AttentionScorer,
    DebiasedScorer,
    DiversityScorer,
    GridReserveScorer,
    RandomAfterScorer,
    RandomScorer,
    Scorer,
    TopHeadsScorer,
    UniformScorer,
)
from pyramiddrop.vllm.names import KEY

#: Scorers with which the engine was tested to generate exactly the adapter's tokens.
SERVED = (AttentionScorer, DebiasedScorer, DiversityScorer, RandomScorer, TopHeadsScorer, UniformScorer)


@dataclass(frozen=True)
class Rules:
    """The settings of a method that the engine's parts need."""

    schedule: Schedule
    scorer: Scorer
    rank_layer: str
    per_image: bool

    @property
    def stages(self) -> int:
        """The number of drops; stage k follows drop k - 1, and stage 0 precedes all."""
        return len(self.schedule.stages)


def configure(vllm_config: Any) -> None:
    """Read and check the method of an engine, and store its settings for all processes of the engine.

    It is read from `hf_overrides`, `additional_config`, or `pyramiddrop.json` beside the checkpoint; by default it is
    the paper's PyramidDrop.

    Raises:
        ValueError: if the settings are not a method, or vLLM cannot serve it.
    """
    method = _method(vllm_config)
    _check(method)
    method.schedule(_depth(vllm_config))
    vllm_config.additional_config = {**_additional(vllm_config), KEY: method.settings()}


def rules_of(vllm_config: Any) -> Rules:
    """The rules that `configure` stored in the engine's configuration."""
    method = Method.from_settings(vllm_config.additional_config[KEY], f"additional_config[{KEY!r}]")
    return Rules(
        schedule=method.schedule(_depth(vllm_config)),
        scorer=method.scorer(),
        rank_layer=method.rank_layer,
        per_image=method.per_image,
    )


def _method(vllm_config: Any) -> Method:
    sources = {
        f"hf_overrides[{KEY!r}]": getattr(vllm_config.model_config.hf_config, KEY, None),
        f"additional_config[{KEY!r}]": _additional(vllm_config).get(KEY),
    }
    methods = [_from(settings, source) for source, settings in sources.items() if settings is not None]
    if not methods:
        saved = _saved(vllm_config.model_config)
        return PyramidDrop() if saved is None else _from(saved, FILE_NAME)
    if any(method != methods[0] for method in methods):
        raise ValueError(f"{' and '.join(sources)} differ: {' and '.join(map(str, methods))}")
    return methods[0]


def _from(settings: Any, source: str) -> Method:
    """The method of the settings; without a name, PyramidDrop."""
    if isinstance(settings, dict) and "method" not in settings:
        settings = {"method": "PyramidDrop", **settings}
    return Method.from_settings(settings, source)


def _saved(model_config: Any) -> Any:
    """The settings in `pyramiddrop.json` beside the checkpoint; None if there is no such file."""
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    return get_hf_file_to_dict(FILE_NAME, model_config.model, model_config.revision)


def _check(method: Method) -> None:
    if method.positions != "original":
        raise ValueError(
            f"positions={method.positions!r} cannot be served: vLLM counts the positions of decoding itself; "
            'use positions="original"'
        )
    if isinstance(method, PreLLMMethod | Compose):
        alone = f"; {method.parts[1]} alone can be" if isinstance(method, Compose) else ""
        raise ValueError(f"{type(method).__name__} cannot be served: it drops before the decoder{alone}")
    if method.merge:
        raise ValueError("merge=True cannot be served: vLLM's later stages hold copies of rows; leave merge=False")
    _check_scorer(method.scorer())
    if method.per_frame:
        raise ValueError("per_frame=True cannot be served; use per_image=True")
    if isinstance(method, RandomDrop) and method.seed is None:
        raise ValueError("RandomDrop(seed=None) cannot be served: each worker would draw other tokens; give it a seed")


def _check_scorer(scorer: Scorer) -> None:
    while isinstance(scorer, GridReserveScorer | RandomAfterScorer):
        scorer = scorer.inner
    if not isinstance(scorer, SERVED):
        names = ", ".join(name for name, kind in SCORERS.items() if kind in SERVED)
        raise ValueError(f"{type(scorer).__name__} cannot be served; score must be one of {names}")


def _additional(vllm_config: Any) -> dict[str, Any]:
    additional = vllm_config.additional_config
    if not additional:
        return {}
    if not isinstance(additional, dict):
        raise ValueError(f"additional_config must be a dict; got {type(additional).__name__}")
    return additional


def _depth(vllm_config: Any) -> int:
    return int(vllm_config.model_config.hf_text_config.num_hidden_layers)


#: The value that switches dropping off for a request.
OFF = "off"


def rules_for(rules: Rules, params: Any) -> Rules:
    """The rules of one request: the engine's, with the request's own keep ratios if `vllm_xargs` has any.

    The drop layers are always those of the engine.

    Args:
        rules: the rules of the engine.
        params: vLLM's sampling parameters of the request; `extra_args` holds its `vllm_xargs`.

    Raises:
        ValueError: for anything but a λ, a list of keep ratios, or "off".
    """
    asked = (getattr(params, "extra_args", None) or {}).get(KEY)
    if asked is None:
        return rules
    layers = rules.schedule.layers
    try:
        return replace(rules, schedule=Schedule.of(layers, _keep(asked, len(layers))))
    except ValueError as error:
        raise ValueError(
            f"vllm_xargs[{KEY!r}] must be a λ in (0, 1], a list of {len(layers)} keep ratios (for the drops before "
            f"layers {list(layers)}), or {OFF!r}: {error}"
        ) from None


def _keep(asked: Any, drops: int) -> list[float]:
    if asked == OFF:
        return [1.0] * drops
    return asked if isinstance(asked, list) else powers(asked, drops)
