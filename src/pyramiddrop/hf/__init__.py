"""The adapter to Hugging Face Transformers: it drops tokens in unmodified models through removable hooks."""

from pyramiddrop.hf.attachment import Attachment, attachment_of
from pyramiddrop.hf.before_decoder import PreLLMAttachment
from pyramiddrop.hf.model_info import UnsupportedModelError, drop_layers, inspect_model
from pyramiddrop.hf.plan import Rules
from pyramiddrop.hf.prompt_masks import GivenMasks
from pyramiddrop.hf.query_key import shared_copy

__all__ = [
    "Attachment",
    "GivenMasks",
    "PreLLMAttachment",
    "Rules",
    "UnsupportedModelError",
    "attachment_of",
    "drop_layers",
    "inspect_model",
    "shared_copy",
]
