"""Register the plugin's architectures, and the hook for their configuration, with vLLM.

An architecture is served if a record in `families.py` names it in `served` and `models.py` has a class for it.
"""

from __future__ import annotations

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from pyramiddrop.vllm.names import ARCHITECTURES, dropping


def register_architectures() -> None:
    """Register all architectures; a second call changes nothing."""
    from pyramiddrop.vllm.unsupported import StagedConfig

    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES:
        name = dropping(architecture)
        if name not in known:
            ModelRegistry.register_model(name, f"pyramiddrop.vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = StagedConfig
