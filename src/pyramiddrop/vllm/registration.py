"""Register the plugin with the vLLM that is installed, where that is one whose parts it knows."""

from __future__ import annotations

import logging
from functools import cache

from pyramiddrop.vllm.names import LOGGER

#: The plugin hooks into parts that vLLM does not promise to keep from one version to the next.
KNOWN = ("0.32", "0.33")


def register() -> None:
    """Make the architectures of this plugin known to vLLM; called by vLLM in each of its processes.

    vLLM calls it unguarded, whether anything is to be dropped or not. So a vLLM that does not fit is warned about once
    and left as it is.
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
    """Import all parts of vLLM that registering needs, and compare those that are hooked with what is relied on.

    Raises:
        RuntimeError: for a vLLM whose version is not in `KNOWN`, or that lacks such a part or has it otherwise.
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
    logger = logging.getLogger(LOGGER)  # `warnings` may be errors
    if logger.hasHandlers():
        logger.warning(message)
        return
    early = logging.StreamHandler()  # vLLM may set up its own after it has loaded its plugins
    early.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", "%m-%d %H:%M:%S"))
    logger.addHandler(early)
    logger.warning(message)
    logger.removeHandler(early)
