"""The adapter to Hugging Face Transformers: unmodified models, hooks that come off again."""

from pyramiddrop.hf.attachment import Attachment, attachment_of
from pyramiddrop.hf.before_decoder import PreLLMAttachment
from pyramiddrop.hf.forward import Rules
from pyramiddrop.hf.model_info import UnsupportedModelError, anatomy, drop_layers
from pyramiddrop.hf.prompt_masks import GivenMasks
from pyramiddrop.hf.query_key import shared_copy

__all__ = [
    "Attachment",
    "GivenMasks",
    "PreLLMAttachment",
    "Rules",
    "UnsupportedModelError",
    "anatomy",
    "attachment_of",
    "drop_layers",
    "shared_copy",
]
