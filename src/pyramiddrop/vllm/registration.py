"""Register the plugin with the installed vLLM, if its version is supported, and build the `hf_overrides` to use it."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

from pyramiddrop.methods import Method
from pyramiddrop.vllm.names import KEY, LOGGER, dropping

#: Supported versions: the plugin hooks into parts that vLLM may change in any version.
KNOWN = ("0.32", "0.33")


def register() -> None:
    """Register the architectures of this plugin; called by vLLM in each of its processes.

    vLLM calls it even if nothing is to be dropped, and does not catch errors. An unsupported vLLM is therefore left
    unchanged, with one warning.
    """
    try:
        check_vllm()
        from pyramiddrop.vllm.architectures import register_architectures
        from pyramiddrop.vllm.requests import guard_requests

        register_architectures()
        guard_requests()
    except Exception as error:
        _warn_once(f"{error}. Nothing is dropped: vLLM serves as without pyramiddrop")


def check_vllm() -> None:
    """Import all parts of vLLM that registration needs, and check the hooked ones.

    Raises:
        RuntimeError: if the version is not in `KNOWN`, or a part is missing or different.
    """
    try:
        from vllm import __version__ as version
    except Exception as error:
        raise RuntimeError(f"pyramiddrop's plugin cannot import vLLM: {type(error).__name__}: {error}") from error
    fits = f"pyramiddrop's plugin fits vLLM {' and '.join(KNOWN)}; {version} is installed"
    if ".".join(version.split(".")[:2]) not in KNOWN:
        raise RuntimeError(f"{fits}. To drop visual tokens, install one that fits")
    try:
        import pyramiddrop.vllm.architectures
        import pyramiddrop.vllm.requests
        import pyramiddrop.vllm.unsupported  # noqa: F401
        from pyramiddrop.vllm.contract import check_contract

        check_contract()
    except Exception as error:
        raise RuntimeError(f"{fits}, but not as expected: {type(error).__name__}: {error}") from error


@cache
def _warn_once(message: str) -> None:
    logger = logging.getLogger(LOGGER)  # `warnings` may be turned into errors
    if logger.hasHandlers():
        logger.warning(message)
        return
    early = logging.StreamHandler()  # vLLM may configure its logger after loading plugins
    early.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", "%m-%d %H:%M:%S"))
    logger.addHandler(early)
    logger.warning(message)
    logger.removeHandler(early)


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
