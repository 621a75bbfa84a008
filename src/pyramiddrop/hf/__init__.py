"""The adapter to Hugging Face Transformers: unmodified models, hooks that come off again."""

from pyramiddrop.hf.attachment import Attachment, attachment_of
from pyramiddrop.hf.families import UnsupportedModelError, anatomy
from pyramiddrop.hf.request import GivenMasks
from pyramiddrop.hf.run import Rules

__all__ = ["Attachment", "GivenMasks", "Rules", "UnsupportedModelError", "anatomy", "attachment_of"]
