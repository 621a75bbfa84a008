"""The command that starts a vLLM server, and an estimate of what dropping saves there."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pyramiddrop import Method
from pyramiddrop.cost import Account, Prompt, account
from pyramiddrop.cost.model_sizes import model_shape, visual_tokens_of
from pyramiddrop.inference.checkpoint import decoder_layers, read_served_config
from pyramiddrop.inference.errors import InputError, user_input
from pyramiddrop.inference.resolve import resolve_method
from pyramiddrop.vllm import hf_overrides

SERVER = "vllm.entrypoints.openai.api_server"
OVERRIDES = "--hf-overrides"
# Of models whose pictures have no fixed number of tokens: about what a picture of a megapixel brings.
VISUAL_TOKENS, TEXT_TOKENS = 1024, 64


@dataclass(frozen=True)
class Saving:
    """One prompt without and with dropping."""

    prompt: Prompt
    vanilla: Account
    pruned: Account

    @property
    def flops_ratio(self) -> float:
        """Of the whole prefill, the vision tower included where its sizes are known."""
        return self.pruned.full.total / self.vanilla.full.total

    @property
    def kv_ratio(self) -> float:
        """Of the KV cache that the prompt needs."""
        return self.pruned.kv_bytes / self.vanilla.kv_bytes


@dataclass(frozen=True)
class Launch:
    """A server that can be started. `saving` is None where the cost model does not know the text model."""

    command: list[str]
    method: Method
    saving: Saving | None


def check_vllm() -> None:
    """Raise InputError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise InputError("vLLM is not installed: pip install 'pyramiddrop[vllm]'")


def prepare_launch(model: str, spec: str | None, arguments: Sequence[str]) -> Launch:
    """Work out the command that serves `model` under a method.

    Args:
        model: folder or hub name of a checkpoint; its configuration alone is read.
        spec: the method in words; None takes the one saved beside the checkpoint, or the paper's.
        arguments: for vLLM, as they are.

    Raises:
        InputError: for anything that the user gave and that cannot be used.
    """
    config = read_served_config(model)
    method = resolve_method(spec, model, decoder_layers(config))
    if method is None:
        raise InputError("--method vanilla drops nothing: for that, start vLLM itself")
    with user_input(caught=(ValueError, RuntimeError)):
        overrides = hf_overrides(model, method)
    merged, others = _merged(overrides, arguments)
    command = [sys.executable, "-m", SERVER, "--model", model, OVERRIDES, json.dumps(merged), *others]
    return Launch(command, method, _saving(config, method))


def _merged(overrides: dict[str, Any], arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """`overrides` with those that stand among vLLM's `arguments`, and the arguments without them."""
    others = list(arguments)
    while OVERRIDES in others:
        place = others.index(OVERRIDES)
        with user_input(f"{OVERRIDES} takes a JSON object", (ValueError, IndexError)):
            given = json.loads(others[place + 1])
        if not isinstance(given, dict) or given.keys() & overrides.keys():
            raise InputError(f"{OVERRIDES} takes a JSON object without {' and '.join(overrides)}, which are set here")
        overrides = {**overrides, **given}
        del others[place : place + 2]
    return overrides, others


def _saving(config: Any, method: Method) -> Saving | None:
    try:
        shape = model_shape(config)
    except ValueError:
        return None
    prompt = Prompt(visual_tokens_of(config) or VISUAL_TOKENS, TEXT_TOKENS)
    pruned = account(shape, prompt, method.schedule(shape.decoder.layers), method.choosing_flops)
    return Saving(prompt, account(shape, prompt), pruned)
