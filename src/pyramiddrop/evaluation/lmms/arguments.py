"""Parse and write `--model_args`, the options of the method and of the backend, and choose the backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from pyramiddrop import Compose, Method, PyramidDrop
from pyramiddrop.inference import InputError
from pyramiddrop.inference.checkpoint import pick_device
from pyramiddrop.inference.resolve import parse_method, saved_method
from pyramiddrop.method_spec import BAR, NAMES, VANILLA, option_names, with_options, written_option


@dataclass(frozen=True)
class Arguments:
    """The parsed `--model_args`: the method, the name of the backend or "auto", and further arguments for it."""

    method: Method | None
    backend: str
    passed: dict[str, Any]


def read_arguments(pretrained: str, given: Mapping[str, Any]) -> Arguments:
    """Separate the method's fields from the backend's arguments.

    A composition is one `method` without commas: `vision:keep=0.5|pyramiddrop:layers=8/16:keep=0.5/0.25`. Fields beside
    it go to the method inside the decoder; settings of a whole forward go to both methods.

    By default, as in `pyramiddrop generate`, the method is the one saved beside the checkpoint, or else the paper's
    PyramidDrop. InputError for an unknown method, or a field or value that it does not have.

    Args:
        given: lmms-eval's parsed arguments: numbers, True and False, and text (lists with slashes: 8/16/24).
    """
    known = set().union(*map(option_names, NAMES.values()))
    options = {name: value for name, value in given.items() if name in known}
    passed = {name: value for name, value in given.items() if name not in known | {"method", "backend"}}
    backend = str(given.get("backend", "auto"))
    if "method" not in given and not options:
        return Arguments(saved_method(pretrained) or PyramidDrop(), backend, passed)
    name = str(given.get("method", "pyramiddrop"))
    words = {option: str(value) for option, value in options.items()}
    return Arguments(parse_method(with_options(name, words)), backend, passed)


def write_arguments(pretrained: str, method: Method | None, others: Mapping[str, Any]) -> str:
    """Write the text of `--model_args` that `read_arguments` parses to the same values.

    `others` are arguments of the backend; None if not given. InputError for names with commas, which lmms-eval cannot
    read, methods without a name, and scorers with settings.
    """
    if "," in pretrained:
        raise InputError(f"lmms-eval cannot read the name of a checkpoint with a comma: {pretrained}")
    given = {"pretrained": pretrained, **_words(method), **others}
    return ",".join(f"{name}={_written(value)}" for name, value in given.items() if value is not None)


def _words(method: Method | None) -> dict[str, Any]:
    """The method's name and its non-default settings; a composition as one text."""
    if method is None:
        return {"method": VANILLA}
    if isinstance(method, Compose):
        return {"method": BAR.join(map(_part, method.parts))}
    name = next((name for name, kind in NAMES.items() if type(method) is kind), None)
    if name is None:
        raise InputError(f"lmms-eval is told a method by its name, and {type(method).__name__} has none")
    told = method.settings()
    changed = [field.name for field in fields(method) if field.init and getattr(method, field.name) != field.default]
    return {"method": name, **{option: "none" if told[option] is None else told[option] for option in changed}}


def _part(method: Method) -> str:
    """A part of a composition, with colons between its options, because commas separate arguments."""
    words = _words(method)
    return ":".join([words.pop("method"), *(f"{option}={_written(value)}" for option, value in words.items())])


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        raise InputError(f"lmms-eval is told a scorer by its name alone; got {dict(value)}")
    return written_option(value)


AUTO, GENERIC = "auto", "generic"


@dataclass(frozen=True)
class Backend:
    """A chat class, `kind` in `module`, by its name in `backend=`."""

    name: str
    families: tuple[str, ...]  # model types that it takes; empty: all that the library supports
    module: str
    kind: str
    batches: bool = True  # True if it takes several requests at a time


_CHAT = "lmms_eval.models.chat"
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("llava_hf", ("llava", "llava_next", "llava_onevision"), f"{_CHAT}.llava_hf", "LlavaHf", batches=False),
        Backend("qwen2_5_vl", ("qwen2_5_vl",), f"{_CHAT}.qwen2_5_vl", "Qwen2_5_VL"),
        Backend("qwen3_vl", ("qwen3_vl", "qwen3_vl_moe"), f"{_CHAT}.qwen3_vl", "Qwen3_VL"),
        Backend(GENERIC, (), "pyramiddrop.evaluation.lmms.model", "Chat"),
    )
}


def pick_backend(name: str, family: str, batch: int, processes: int, device: str) -> Backend:
    """The named backend; "auto": lmms-eval's own if it takes this model and these arguments, or else ours.

    InputError for an unknown name, or a backend that does not take this model or these arguments.
    """
    if name == AUTO:
        fitting = (one for one in BACKENDS.values() if not _objection(one, family, batch, processes, device))
        return next(fitting)
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not one of {', '.join([AUTO, *BACKENDS])}")
    if objection := _objection(BACKENDS[name], family, batch, processes, device):
        raise InputError(f"backend {name} {objection}; use backend={GENERIC}")
    return BACKENDS[name]


def _objection(backend: Backend, family: str, batch: int, processes: int, device: str) -> str:
    if backend.families and family not in backend.families:
        return f"takes {', '.join(backend.families)}, and this checkpoint is {family}"
    if batch > 1 and not backend.batches:
        return f"takes batch_size 1; got {batch}"
    if backend.name != GENERIC and processes > 1 and not device.startswith("cuda"):
        return f"runs {processes} processes on CUDA only"
    return ""


def load_backend(
    backend: Backend, pretrained: str, batch: int, processes: int, device: str, passed: Mapping[str, Any]
) -> Any:
    """Construct the backend, which loads its model.

    A single process needs an explicit device for lmms-eval's classes, because their defaults are "auto", which means
    CUDA, or "", which Transformers 5 refuses; several processes place the model themselves. InputError if the backend
    cannot be imported, or does not have an argument.
    """
    try:
        kind = getattr(import_module(backend.module), backend.kind)
    except ImportError as error:
        raise InputError(f"backend {backend.name} cannot be imported ({error}); use backend={GENERIC}") from error
    mapped = {"device_map": device} if backend.name != GENERIC and processes == 1 else {}
    try:
        return kind(pretrained=pretrained, batch_size=batch, device=device, **(mapped | dict(passed)))
    except (TypeError, AssertionError) as error:
        if "unexpected" not in str(error).lower():
            raise
        raise InputError(f"backend {backend.name}: {error}") from error


def where(device: str | None, processes: int, own: str) -> str:
    """The device: a process's `own` among several, else the given one, else the best one available."""
    return own if processes > 1 and device != "cpu" else str(pick_device(device))
