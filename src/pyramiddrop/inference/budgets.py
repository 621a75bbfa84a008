"""Parse the budget and the values to solve for, as the command line gives them, and solve it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyramiddrop.inference import InputError, user_input
from pyramiddrop.inference.resolve import parse_method
from pyramiddrop.inference.sizes import Sizes
from pyramiddrop.methods import PreLLMMethod
from pyramiddrop.planning import Before, Budget, MeasuredTimes, Plan, Profile, plan
from pyramiddrop.schedule import PreLLMSchedule

#: Names of budgets on the command line, and in the library.
KINDS = {
    "average_tokens": "tokens",
    "tflops": "tflops",
    "percent": "percent",
    "kv_bytes": "kv_bytes",
    "measure": "milliseconds",
}


@dataclass(frozen=True)
class BudgetOptions:
    """The options of `plan`, None if not given. `measure` is in milliseconds."""

    average_tokens: float | None = None
    tflops: float | None = None
    percent: float | None = None
    kv_bytes: float | None = None
    measure: float | None = None
    convention: str = "full"
    stages: int | None = None
    lam: float | None = None
    pyramid: str | None = None
    profile: Path | None = None
    before: str | None = None


def make_plan(options: BudgetOptions, sizes: Sizes) -> Plan:
    """Solve for the plan that `options` describe. Raises InputError if there is not exactly one budget, it is out of
    reach, options contradict each other, or a value is not allowed."""
    budget, before, profile = _budget(options, sizes), None, None
    if options.profile is not None:
        with user_input(f"cannot read {options.profile}", (OSError,)), user_input():
            profile = Profile.read(options.profile)
    if options.before is not None:
        method = parse_method(options.before)
        if not isinstance(method, PreLLMMethod):
            raise InputError(
                f"--before takes a method that drops before the decoder, vision or downsample; got {options.before!r}"
            )
        schedule = PreLLMSchedule(method.schedule(sizes.shape.decoder.layers).stages)
        before = Before(schedule, repr(method), method.ranking_flops)
    chosen = {name: getattr(options, name) for name in ("lam", "stages", "pyramid")}
    with user_input():
        return plan(sizes.shape, sizes.prompt, budget, **chosen, profile=profile, before=before)


def read_times(path: Path, sizes: Sizes) -> MeasuredTimes:
    """Read bench's measurements of the model and the prompt in `sizes`. Raises InputError for a file that cannot be
    read, is no such record, or is one of another model or prompt."""
    with user_input(f"cannot read {path}", (OSError,)), user_input():
        times = MeasuredTimes.read(path)
        times.check(sizes.shape, sizes.prompt)
    return times


def _budget(options: BudgetOptions, sizes: Sizes) -> Budget:
    given = {word: getattr(options, word) for word in KINDS if getattr(options, word) is not None}
    if len(given) != 1:
        words = ", ".join(f"--{word.replace('_', '-')}" for word in given or KINDS)
        raise InputError(f"give one budget; got {words}" if given else f"give a budget: one of {words}")
    ((word, limit),) = given.items()
    clock = None
    if word == "measure":
        from pyramiddrop.inference.timing import LayerProfiler

        clock = LayerProfiler(sizes.shape.decoder)
    with user_input():
        return Budget(**{KINDS[word]: limit}, convention=options.convention, clock=clock)
