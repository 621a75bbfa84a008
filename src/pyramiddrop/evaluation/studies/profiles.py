"""Owns the way from a redundancy study to the profile that `pyramiddrop plan --profile` reads."""

from __future__ import annotations

from typing import Any


def profile_of(model: dict[str, Any]) -> dict[str, Any]:
    """The redundancy profile of one model of a study, as `pyramiddrop.planning.Profile` reads it.

    Its score is the accuracy where answers are known, and else the agreement of whole answers with the full model's.
    """
    vanilla = model["vanilla"]["accuracy"]
    metric = "agreement" if vanilla is None else "accuracy"
    return {
        "model": model["name"],
        "source": model["source"],
        "samples": model["samples"],
        "num_layers": model["num_layers"],
        "vanilla": 1.0 if vanilla is None else vanilla["mean"],
        "cells": [
            {"layer": cell["layer"], "keep": cell["keep"], metric: cell[metric]["mean"]} for cell in model["cells"]
        ],
    }
