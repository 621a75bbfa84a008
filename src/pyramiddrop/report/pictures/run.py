"""Owns the way from a run of the command line to what can be drawn of it."""

from __future__ import annotations

from pyramiddrop.inference.choice import method_label
from pyramiddrop.inference.run import Run
from pyramiddrop.report.pictures.visual import Visual, check_drawn_method, visualize


def run_visual(done: Run) -> Visual:
    """What the run's method kept of its pictures.

    Raises:
        ValueError: where its method is none of which anything could be drawn, vanilla for one.
    """
    check_drawn_method(done.method.lower())
    ready, method, trace = done.ready, done.ready.method, done.trace
    assert method is not None, "vanilla has been refused"
    assert trace is not None, "every method leaves a trace"
    return visualize(
        trace,
        ready.checkpoint.model.config,
        ready.checkpoint.processor,
        ready.pictures,
        ready.inputs,
        ready.request.prompt,
        done.answer,
        f"{ready.request.model or 'the bundled model'} under {method_label(method)}",
        videos=[ready.film.frames] if ready.film else [],
    )
