"""Turn what a user gave into a prepared request; cheap checks come before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pyramiddrop import Method
from pyramiddrop.assets import digits_checkpoint
from pyramiddrop.hf.anatomy import UnsupportedModelError, anatomy
from pyramiddrop.inference.checkpoint import Checkpoint, decoder_layers, load_checkpoint, read_config
from pyramiddrop.inference.choice import MethodOptions, choose_method
from pyramiddrop.inference.errors import user_input
from pyramiddrop.inference.film import Film, check_film, open_film
from pyramiddrop.inference.prompt import build_inputs, check_prompt, open_picture


@dataclass(frozen=True)
class Request:
    """A question about pictures, then a video, and what shall answer it.

    `model` None is the bundled one; `frames` is how many are taken of the video.
    """

    prompt: str
    images: Sequence[Path]
    model: str | None = None
    options: MethodOptions = field(default_factory=MethodOptions)
    device: str | None = None
    dtype: str | None = None
    video: Path | None = None
    frames: int = 8


@dataclass(frozen=True)
class Ready:
    """A request that can run. `method` is None for vanilla."""

    request: Request
    checkpoint: Checkpoint
    method: Method | None
    pictures: list[Image.Image]
    inputs: Any
    film: Film | None = None


def prepare(request: Request) -> Ready:
    """Check the request, load its checkpoint, and build the model's inputs.

    Raises:
        InputError: for anything that the user gave and that cannot be used.
    """
    source = request.model or str(digits_checkpoint())
    check_prompt(request.prompt, len(request.images), videos=request.video is not None)
    pictures, config = [open_picture(path) for path in request.images], read_config(source)
    film = None
    if request.video:
        check_film(config.model_type, source)
        film = open_film(request.video, request.frames)
    method = choose_method(request.options, source, decoder_layers(config))
    checkpoint = load_checkpoint(source, request.device, request.dtype)
    inputs = build_inputs(checkpoint.processor, pictures, request.prompt, film)
    with user_input(caught=(UnsupportedModelError,)):
        _check_model(checkpoint, method)
    return Ready(request, checkpoint, method, pictures, inputs, film)


def _check_model(checkpoint: Checkpoint, method: Method | None) -> None:
    """A model or a method that cannot work says so when it is taken apart or attached; better now than half way."""
    anatomy(checkpoint.model)
    if method is not None:
        with method(checkpoint.model):
            pass
