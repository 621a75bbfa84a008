"""Register the plugin with the installed vLLM, if its version is supported."""

from __future__ import annotations

import logging
from functools import cache

from pyramiddrop.vllm.names import LOGGER

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
