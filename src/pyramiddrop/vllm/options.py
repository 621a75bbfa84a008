"""Build the `hf_overrides` with which an engine drops tokens, from a checkpoint and a method."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from pyramiddrop.methods import Method
from pyramiddrop.vllm.names import KEY, dropping
from pyramiddrop.vllm.registration import check_vllm


def hf_overrides(model: str, method: Method | None = None, revision: str | None = None) -> dict[str, Any]:
    """The `hf_overrides` of `LLM` to serve `model` with dropping.

    Args:
        model: folder or hub name of a checkpoint; only its config.json is read.
        method: the method; None: the one saved beside the checkpoint (pyramiddrop.json), or the paper's PyramidDrop.
        revision: revision of the checkpoint on the hub.

    Raises:
        ValueError: if config.json cannot be read, or the plugin does not serve its architecture.
        RuntimeError: if the plugin does not support the installed vLLM.
    """
    from transformers import PretrainedConfig

    if find_spec("vllm") is not None:  # without vLLM here, the server may run on another machine
        check_vllm()
    config, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    named = config.get("architectures") or []
    if not named:
        raise ValueError(f"{model}: config.json names no architecture, or there is none")
    settings = {} if method is None else {KEY: method.settings()}
    return {"architectures": [dropping(named[0])], **settings}
