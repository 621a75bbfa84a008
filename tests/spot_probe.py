"""A picture with one lit spot, and how much of its light reaches each visual token by a family's own way.

The family's processor cuts the picture, and its tiny random model makes tokens of the pixels, shuffles, pools and packs
them. Attention and MLPs of the vision tower are made to add nothing, so that each patch keeps to itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from pyramiddrop.hf.model_info import inspect_model
from pyramiddrop.report.token_layout.views import PlacedView

SIZES = [(120, 120), (260, 90), (90, 260)]
SPOTS = [(0.1, 0.2), (0.75, 0.4), (0.55, 0.9), (0.45, 0.58)]


def lit(size: tuple[int, int], place: tuple[float, float]) -> Image.Image:
    """Black, with a soft white spot at `place`, which is told as shares of width and height."""
    columns, rows = np.arange(size[0])[None] + 0.5, np.arange(size[1])[:, None] + 0.5
    distance = (columns - place[0] * size[0]) ** 2 + (rows - place[1] * size[1]) ** 2
    return Image.fromarray((255 * np.exp(-distance / 18)).astype(np.uint8)).convert("RGB")


def word_tokenizer(ids: dict[str, int], **named: str) -> PreTrainedTokenizerFast:
    """Words w0, w1, ...; special tokens with these `ids`, of which some are also attributes (`image_token`)."""
    words = {number: f"w{number}" for number in range(200)} | {number: token for token, number in ids.items()}
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in words.items()}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="w0",
        unk_token="w0",
        bos_token="w1",
        eos_token="w2",
        sep_token="w3",
        extra_special_tokens={f"mark_{number}": token for token, number in ids.items()} | named,
    )


def wide_gemma4(model: Any) -> Any:
    """A tiny Gemma 4 with places for more rows and columns of patches."""
    embedder = model.model.vision_tower.patch_embedder
    embedder.position_embedding_table.data = torch.zeros(2, 64, embedder.hidden_size)
    return model


def token_light(model: Any, inputs: Any, dark: Any) -> Tensor:
    """What each visual token of `inputs` has beyond what it has in `dark`, in the order of the prompt."""
    with _keeping_to_itself(model):
        light, none = _embeddings(model, inputs), _embeddings(model, dark)
    ids = inputs["input_ids"][0]
    visual = sum(ids == number for number in inspect_model(model).visual_ids).bool()
    return (light - none).norm(dim=-1)[visual]


def assert_lit(seen: Sequence[PlacedView], light: Tensor, place: tuple[float, float], slack: float = 0.2) -> int:
    """In every view that shows the spot, the token with the most light covers it, or lies less than `slack` cells
    beside it. How many views show it."""
    assert sum(one.view.tokens for one in seen) == len(light)
    shown = 0
    for one, values in zip(seen, light.split([one.view.tokens for one in seen]), strict=True):
        view, (x, y) = one.view, (place[0] * one.picture.width, place[1] * one.picture.height)
        row = (y - view.box.top) / (view.box.height / view.rows)
        column = (x - view.box.left) / (view.box.width / view.columns)
        if not (0 < row < view.rows and 0 < column < view.columns):
            continue  # the view leaves the spot out
        cell = view.cell(int(values.argmax()))
        assert cell is not None
        assert -slack <= row - cell[0] <= 1 + slack
        assert -slack <= column - cell[1] <= 1 + slack
        shown += 1
    return shown


def _embeddings(model: Any, inputs: Any) -> Tensor:
    """What goes into the first decoder layer, (L, D)."""
    found: list[Tensor] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    hook = inspect_model(model).layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**{name: value.float() if value.is_floating_point() else value for name, value in inputs.items()})
    finally:
        hook.remove()
    return found[0].reshape(-1, *found[0].shape[-2:])[0]


@contextmanager
def _keeping_to_itself(model: Any) -> Iterator[None]:
    text = set(inspect_model(model).text.modules())
    blocks = [block for block in model.modules() if block not in text and _is_block(block)]
    info = [part for block in blocks for part in block.children() if _attends(part) or _mixes(part)]
    hooks = [part.register_forward_hook(_nothing) for part in info]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_block(module: nn.Module) -> bool:
    """A layer of a tower; what pools patches by attention has no norm."""
    return any(map(_attends, module.children())) and any("Norm" in type(part).__name__ for part in module.children())


def _attends(part: nn.Module) -> bool:
    return type(part).__name__.endswith("Attention")


def _mixes(part: nn.Module) -> bool:
    return type(part).__name__.lower().endswith(("mlp", "mlpblock"))


def _nothing(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return type(output)([torch.zeros_like(output[0]), *output[1:]])
