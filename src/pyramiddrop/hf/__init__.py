"""The adapter to Hugging Face Transformers: unmodified models, hooks that come off again."""

from pyramiddrop.hf.anatomy import UnsupportedModelError, anatomy
from pyramiddrop.hf.attachment import Attachment, attachment_of
from pyramiddrop.hf.front import FrontAttachment
from pyramiddrop.hf.limits import drop_layers
from pyramiddrop.hf.request import GivenMasks
from pyramiddrop.hf.run import Rules
from pyramiddrop.hf.shared_copy import shared_copy

__all__ = [
    "Attachment",
    "FrontAttachment",
    "GivenMasks",
    "Rules",
    "UnsupportedModelError",
    "anatomy",
    "attachment_of",
    "drop_layers",
    "shared_copy",
]
