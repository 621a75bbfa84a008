"""The pruning configuration of one engine: where it is read, and what follows for a decoder of its depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyramiddrop.methods import FILE_NAME, Compose, Method, PreLLMMethod, PyramidDrop, RandomDrop
from pyramiddrop.schedule import Schedule
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

#: Scorers whose tokens on the engine were seen to be those of the adapter, one by one.
SERVED = (AttentionScorer, DebiasedScorer, DiversityScorer, RandomScorer, TopHeadsScorer, UniformScorer)


@dataclass(frozen=True)
class Rules:
    """What the engine's parts need to know of a method."""

    schedule: Schedule
    scorer: Scorer
    rank_layer: str
    per_image: bool

    @property
    def stages(self) -> int:
        """Number of drops; stage 0 has none behind it."""
        return len(self.schedule.stages)


def configure(vllm_config: Any) -> None:
    """Read the method of an engine, check it, and leave its settings where every process of the engine finds them.

    Read from `hf_overrides`, from `additional_config`, from `pyramiddrop.json` beside the checkpoint, or, where none
    says anything, the paper's PyramidDrop.

    Raises:
        ValueError: for settings that make no method, or one that vLLM cannot serve.
    """
    method = _method(vllm_config)
    _check(method)
    method.schedule(_depth(vllm_config))
    vllm_config.additional_config = {**_additional(vllm_config), KEY: method.settings()}


def rules_of(vllm_config: Any) -> Rules:
    """The rules that `configure` left in the engine's configuration."""
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
    """Settings without a method's name are PyramidDrop's."""
    if isinstance(settings, dict) and "method" not in settings:
        settings = {"method": "PyramidDrop", **settings}
    return Method.from_settings(settings, source)


def _saved(model_config: Any) -> Any:
    """What `pyramiddrop.json` beside the checkpoint holds, or None where there is no such file."""
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
