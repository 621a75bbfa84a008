"""Versions of vLLM that the plugin supports: it hooks into parts that vLLM does not promise to keep."""

from __future__ import annotations

KNOWN = ("0.32", "0.33")


def check_version() -> None:
    """Raise RuntimeError where the installed vLLM is none of `KNOWN`."""
    from vllm import __version__

    minor = ".".join(__version__.split(".")[:2])
    if minor not in KNOWN:
        raise RuntimeError(
            f"pyramiddrop's plugin fits vLLM {' and '.join(KNOWN)}; {__version__} is installed. Install one of those, "
            "or keep vLLM from loading the plugin: VLLM_PLUGINS=''"
        )
