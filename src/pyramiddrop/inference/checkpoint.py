"""Load a checkpoint: configuration, processor, weights on a suitable device, and the method saved beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoProcessor, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from pyramiddrop.families import FAMILIES
from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.resolve import saved_method
from pyramiddrop.methods import Method, apply

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICES = ("cuda", "mps", "cpu")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model with its processor; `source` is its folder or its name on the hub."""

    model: Any
    processor: Any
    source: str

    @property
    def num_layers(self) -> int:
        """The number of layers of the language model."""
        return decoder_layers(self.model.config)


def read_config(source: str | Path) -> Any:
    """The configuration of a checkpoint, without its weights. Raises InputError if there is no checkpoint, or its
    family is not supported."""
    config = read_any_config(source)
    family = config.model_type
    if family not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise InputError(f"model family {family!r} of {source} is not supported: it is no image-text-to-text model")
    refused = FAMILIES[family].refused if family in FAMILIES else ""
    if refused:
        raise InputError(f"model family {family!r} of {source} is not supported: {refused}")
    return config


def read_any_config(source: str | Path) -> Any:
    """The configuration of a checkpoint of any family in Transformers; code in the checkpoint is not run. Raises
    InputError if there is no checkpoint."""
    with _reading(source):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)  # None would ask the user


def read_served_config(source: str | Path) -> Any:
    """The configuration of a checkpoint for vLLM; that of its language model if Transformers does not know the whole.
    Raises InputError if there is no checkpoint, or Transformers does not know its language model.

    InternVL in its authors' format contains code that reads its configuration; it is not run here.
    """
    with _reading(source):
        values, _ = PretrainedConfig.get_config_dict(source)
        if values.get("model_type") in CONFIG_MAPPING or "llm_config" not in values:
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
        return AutoConfig.for_model(**values["llm_config"])


@contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """Turn all errors about the place `source` and its configuration into InputErrors."""
    folder, name = Path(source), str(source)
    if folder.is_file():
        raise InputError(f"{folder} is a file; a checkpoint is a folder or a name on the hub")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"no checkpoint in {folder}: it has no config.json")
        unread = f"cannot read a checkpoint at {source}"
    else:
        # Either a local path, which is no valid name on the hub or begins with an existing folder, or such a name.
        here = len(folder.parts) > 1 and Path(folder.parts[0]).is_dir()
        if here or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise InputError(f"no such folder: {source}")
        unread = f"no such folder: {source}, and no checkpoint of that name can be read from the hub"
    with user_input(unread, (OSError, ValueError)):
        yield


def decoder_layers(config: Any) -> int:
    """The number of layers of the language model inside a model of this configuration."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def load_checkpoint(source: str | Path, device: str | None = None, dtype: str | None = None) -> Checkpoint:
    """Load a checkpoint for inference. Raises InputError if the checkpoint, device or dtype cannot be used.

    Args:
        source: a folder in Hugging Face's format, or a name on the hub.
        device: `cuda`, `cuda:1`, `mps` or `cpu`; None: the best one available.
        dtype: `float32`, `float16`, `bfloat16`, or `auto` for the checkpoint's own; None: one that suits the device.
    """
    read_config(source)
    place = pick_device(device)
    number = pick_dtype(place, dtype)
    with user_input(f"cannot load the processor of {source}", (OSError, ValueError, ImportError)):
        processor = load_processor(source)
    with user_input(f"cannot load the weights of {source}", (OSError, ValueError, SafetensorError)):
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=number)
    return Checkpoint(model.to(place).eval(), processor, str(source))


def load_processor(source: str | Path) -> Any:
    """The checkpoint's processor, with Pillow's image backend if torchvision is not installed."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(source)
    try:
        return AutoProcessor.from_pretrained(source, backend="pil")
    except TypeError:  # a processor with a single image backend, which does not take the argument
        return AutoProcessor.from_pretrained(source)


def pick_device(name: str | None) -> torch.device:
    """The named device, or the best one of this machine: CUDA, then Apple's MPS, then the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind in DEVICES if available[kind]))
    kind, colon, index = name.partition(":")
    if kind not in available or (colon and not index.isdecimal()):
        raise InputError(f"device {name!r} is not one of {', '.join(DEVICES)}")
    device = torch.device(name)
    if not available[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {name!r} is not available on this machine")
    return device


def pick_dtype(device: torch.device, name: str | None) -> torch.dtype | str:
    """The named dtype, or one that suits `device`: bfloat16 on CUDA (float16 on old cards), float16 on MPS.

    On a CPU it is always float32, because half precision is slow or inexact there.
    """
    if name == "auto":
        return name
    if name is not None:
        if name not in DTYPES:
            raise InputError(f"dtype {name!r} is not one of {', '.join(DTYPES)}, auto")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


SAVED = "saved"


def load(source: str | Path, method: Method | str | None = SAVED, **options: Any) -> Any:
    """Load a model, and apply the method that was saved beside it, if any.

    >>> model = pyramiddrop.load("runs/my-llava")          # with the method that it was trained with
    >>> model = pyramiddrop.load("runs/my-llava", None)    # without dropping

    Args:
        source: a folder or a name on the hub, of a whole model or of a LoRA adapter.
        method: another method to apply; None: none.
        options: arguments of `AutoModelForImageTextToText.from_pretrained`.

    Raises:
        ValueError: if `pyramiddrop.json` cannot be read, or the method does not fit the model.
    """
    if isinstance(method, str) and method != SAVED:
        raise ValueError(f"method must be a Method, {SAVED!r} or None; got {method!r}")
    chosen = saved_method(source) if isinstance(method, str) else method
    model = AutoModelForImageTextToText.from_pretrained(source, **options)
    if chosen is not None:
        apply(model, chosen)
    return model
