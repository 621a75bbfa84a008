"""Names of the plugin's architectures and settings."""

from __future__ import annotations

from pyramiddrop.families import FAMILIES

#: Prefix of the name of a served architecture.
PREFIX = "PyramidDrop"
#: The key of the settings, in `hf_overrides` and in `additional_config`.
KEY = "pyramiddrop"
#: A logger below vLLM's own, for the same level, time format and handler.
LOGGER = "vllm.pyramiddrop"

#: Architectures that can be served; `models` has a class of the same name with `PREFIX` for each.
ARCHITECTURES = tuple(name for family in FAMILIES.values() for name in family.served)


def dropping(architecture: str) -> str:
    """The name of the plugin's architecture for `architecture`.

    Raises:
        ValueError: if the plugin has none.
    """
    if architecture.startswith(PREFIX):
        return architecture
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"pyramiddrop cannot serve {architecture} with dropping; it can serve {', '.join(ARCHITECTURES)}"
        )
    return PREFIX + architecture
