"""Tiny random models of every family that is supported, by name: what the conformance suite runs on."""

from __future__ import annotations

from zoo.pieces import Answer, Member, make_batch, make_rows

MEMBERS: dict[str, Member] = {}

__all__ = ["MEMBERS", "Answer", "Member", "make_batch", "make_rows"]
