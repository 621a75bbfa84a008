"""Tell vLLM's LoRA layers which adapter each row of a staged forward has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.nn import Module
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper import get_punica_wrapper


class RowAdapters:
    """The LoRA adapters of one step's rows.

    vLLM maps each token of a step to its adapter, once for all layers. A later stage computes other rows: fewer ones,
    but also those of earlier parts of a prompt. So may a drop, which ranks one request alone.
    """

    def __init__(self, manager: Any, tokens: int) -> None:
        """Begin with vLLM's map for the `tokens` of a step; its LoRA `manager` is None if no adapters are served."""
        mapping = None if manager is None else manager._last_mapping
        self._manager = manager
        self._adapters: tuple[int, ...] = () if mapping is None else mapping.index_mapping[:tokens]
        if not any(self._adapters):
            self._adapters = ()  # nothing to map

    def of(self, start: int, end: int) -> tuple[int, ...]:
        """The adapters of the step's tokens from `start` to `end`, 0 for none; empty if no request has one."""
        return self._adapters[start:end]

    @contextmanager
    def rows(self, layers: Module, adapters: Sequence[int]) -> Iterator[None]:
        """Within it, `layers` compute rows with these `adapters`; without any, it changes nothing."""
        if not adapters:
            yield
            return
        manager = self._manager
        # One for these rows, because vLLM's own has room for the tokens of a step, and captured graphs read it.
        wrapper = get_punica_wrapper(
            len(adapters), max_batches=manager.max_num_seqs, device=manager.device, lora_config=manager.lora_config
        )
        mapping = LoRAMapping(tuple(adapters), (), is_prefill=True)
        wrapper.update_metadata(mapping, manager.lora_index_to_id, manager.lora_slots + 1, manager.vocab_size)
        before = {module: module.punica_wrapper for module in layers.modules() if hasattr(module, "punica_wrapper")}
        for module in before:
            module.punica_wrapper = wrapper
        try:
            yield
        finally:
            for module, own in before.items():
                module.punica_wrapper = own
