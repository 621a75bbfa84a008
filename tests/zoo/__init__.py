"""Tiny random models of every family that is supported, by name: what the conformance suite runs on."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

# Older ones lack families, and can do less with those they have: what imports the zoo is skipped there.
pytest.importorskip("transformers", minversion="5.23")

from zoo import (
    chunked,
    deepstack,
    gemma_like,
    glm_like,
    hybrid,
    llava_like,
    mla,
    qwen_like,
    tiled,
    token_image,
    uneven,
)
from zoo.pieces import Answer, Member, make_batch, make_rows
from zoo.unsupported import UNSUPPORTED

_FILES = (
    chunked,
    deepstack,
    glm_like,
    gemma_like,
    hybrid,
    llava_like,
    mla,
    qwen_like,
    tiled,
    token_image,
    uneven,
)
if find_spec("transformers.models.apertus1p5"):
    from zoo import apertus

    _FILES = (*_FILES, apertus)
MEMBERS: dict[str, Member] = {member.name: member for file in _FILES for member in file.MEMBERS}

__all__ = ["MEMBERS", "UNSUPPORTED", "Answer", "Member", "make_batch", "make_rows"]
