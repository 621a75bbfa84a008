"""Names of the plugin's architectures and of its settings."""

from __future__ import annotations

from pyramiddrop.families import FAMILIES

#: Stands before the name of the architecture that is served.
PREFIX = "PyramidDrop"
#: The key of the settings, in `hf_overrides` and in `additional_config`.
KEY = "pyramiddrop"
#: Below vLLM's own logger, whose level, time and handler its messages then have.
LOGGER = "vllm.pyramiddrop"

#: Architectures that can be served. That of the same name with `PREFIX` stands in `models`.
ARCHITECTURES = tuple(name for family in FAMILIES.values() for name in family.served)


def dropping(architecture: str) -> str:
    """The name of the architecture that serves `architecture` and drops.

    Raises:
        ValueError: where the plugin has none.
    """
    if architecture.startswith(PREFIX):
        return architecture
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"pyramiddrop cannot serve {architecture} with dropping; it can serve {', '.join(ARCHITECTURES)}"
        )
    return PREFIX + architecture
