"""The random weights of a tiny model, and what every tiny text model has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from zoo.pieces import LAST_TEXT

transformers.logging.set_verbosity_error()

VOCABULARY = 200
IMAGE, VIDEO, START, END = 190, 191, 192, 193

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def drawn(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """A float32 model in eval mode whose scores are well separated and that generates ordinary text alone, for ever."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            _draw(parameter)
        _silence(_head(model))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _draw(parameter: Tensor) -> None:
    if parameter.dim() == 3 and parameter.shape[1] == 1:  # a convolution in time, channel by channel: few inputs
        parameter.normal_(0, 0.5)
    elif parameter.dim() > 1:
        parameter.normal_(0, 0.12)
    else:  # norms and biases, about what their modules set them to
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _head(model: PreTrainedModel) -> torch.nn.Module:
    """The output embedding; that of the language model inside where the outer class does not tell."""
    head = model.get_output_embeddings()
    return model.language_model.get_output_embeddings() if head is None else head


def _silence(head: torch.nn.Module) -> None:
    """Padding and special ids score 0 and so are never the likeliest: no image id is ever generated."""
    for parameter in head.parameters():
        parameter[:2] = 0
        parameter[LAST_TEXT:] = 0
