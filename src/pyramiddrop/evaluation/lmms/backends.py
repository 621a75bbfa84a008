"""Choose the backend that builds prompts and generates: a chat class of lmms-eval's own, or the generic backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pyramiddrop.inference.checkpoint import pick_device
from pyramiddrop.inference.errors import InputError

AUTO, GENERIC = "auto", "generic"


@dataclass(frozen=True)
class Backend:
    """A chat class.

    Attributes:
        name: its name in `backend=`.
        families: model types that it takes; empty: all that the library supports.
        module, kind: the module and the name of its class.
        batches: True if it takes several requests at a time.
    """

    name: str
    families: tuple[str, ...]
    module: str
    kind: str
    batches: bool = True


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "llava_hf",
            ("llava", "llava_next", "llava_onevision"),
            "lmms_eval.models.chat.llava_hf",
            "LlavaHf",
            batches=False,
        ),
        Backend("qwen2_5_vl", ("qwen2_5_vl",), "lmms_eval.models.chat.qwen2_5_vl", "Qwen2_5_VL"),
        Backend("qwen3_vl", ("qwen3_vl", "qwen3_vl_moe"), "lmms_eval.models.chat.qwen3_vl", "Qwen3_VL"),
        Backend(GENERIC, (), "pyramiddrop.evaluation.lmms.chat", "Chat"),
    )
}


def pick_backend(name: str, family: str, batch: int, processes: int, device: str) -> Backend:
    """The named backend; "auto": lmms-eval's own if it takes this model and these arguments, or else ours.

    Raises:
        InputError: for an unknown name, or a backend that does not take this model or these arguments.
    """
    if name == AUTO:
        own = (backend for backend in BACKENDS.values() if not _objection(backend, family, batch, processes, device))
        return next(own)
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not one of {', '.join([AUTO, *BACKENDS])}")
    objection = _objection(BACKENDS[name], family, batch, processes, device)
    if objection:
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
    CUDA, or "", which Transformers 5 refuses; several processes place the model themselves.

    Raises:
        InputError: if it cannot be imported, or does not have an argument.
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
