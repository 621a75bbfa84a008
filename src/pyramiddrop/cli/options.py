"""Options that verbs share, each written once, alone or in groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer import Option
from typer.core import TyperCommand

from pyramiddrop.cli.terminal import say, spinner
from pyramiddrop.inference import InputError

if TYPE_CHECKING:
    from pyramiddrop.evaluation.tasks import Task
    from pyramiddrop.inference.request import PreparedRequest
    from pyramiddrop.inference.sizes import Sizes


class Panel(str):
    """The title of a help panel; call it to make an option in it: `OUTPUT("--json", help="...")`."""

    def __call__(self, *names: str, **settings: Any) -> Any:
        return Option(*names, rich_help_panel=self, **settings)


METHOD, WHAT, HOW, OUTPUT = Panel("Method"), Panel("What is asked"), Panel("How"), Panel("Output")
SIZES, PROMPT = Panel("Sizes of the model (one source)"), Panel("The prompt")

Model = Annotated[str | None, WHAT(help="Folder or hub name of a checkpoint. (default: the bundled one)")]
Images = Annotated[list[Path] | None, WHAT("--image", help="One or more pictures.", metavar="FILE...")]
OneMethod = Annotated[
    str | None,
    METHOD(
        help="pyramiddrop, fastv, random, uniform, ... or vanilla, with options: fastv:layer=3,keep=0.25. `pyramiddrop "
        "methods` lists them. (default: the saved one, or pyramiddrop)"
    ),
]
Methods = Annotated[
    list[str] | None,
    METHOD(
        "--method",
        help="One or more beside vanilla: pyramiddrop:lam=0.6 fastv:layer=3,keep=0.25 ... `pyramiddrop methods` lists "
        "them.",
        metavar="METHOD...",
    ),
]
Percents = Annotated[
    list[float] | None,
    METHOD(
        "--percent",
        help="Solve the keep ratios of every method for so much of vanilla's decoder FLOPs; one or more.",
        metavar="PERCENT...",
    ),
]
Device = Annotated[str | None, HOW(help="cuda, mps or cpu. (default: the best there is)")]
Dtype = Annotated[str | None, HOW(help="float32, float16, bfloat16, auto. (default: fits the device)")]
AsJson = Annotated[bool, OUTPUT("--json", help="Print one JSON object and nothing else.")]


class OptionGroup:
    """The base of dataclasses whose fields are options."""

    @property
    def given(self) -> dict[str, Any]:
        """The given options."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class MethodOptions(OptionGroup):
    """Options that set arguments of a method: `--lam 0.6` stands for `:lam=0.6`."""

    lam: Annotated[str | None, METHOD(help="λ: each drop keeps this share of what is left.", metavar="NUMBER")] = None
    stages: Annotated[str | None, METHOD(help="So many equal stages of the layers.", metavar="NUMBER")] = None
    layers: Annotated[str | None, METHOD(help="Drop before these layers: 8,16,24.", metavar="LIST")] = None
    keep: Annotated[str | None, METHOD(help="Shares of the original tokens to keep: 0.5,0.25.", metavar="LIST")] = None
    layer: Annotated[str | None, METHOD(help="fastv: drop before this layer.", metavar="NUMBER")] = None
    positions: Annotated[str | None, METHOD(help="original, or compact: renumber after a drop.")] = None
    score: Annotated[str | None, METHOD(help="What ranks; `pyramiddrop methods` lists the scorers.")] = None
    reserve: Annotated[str | None, METHOD(help="Share of the kept tokens that is evenly spaced.", metavar="NUMBER")] = (
        None
    )
    random_from: Annotated[
        str | None,
        METHOD(help="Select tokens at random for drops before this layer and deeper ones.", metavar="NUMBER"),
    ] = None
    merge: Annotated[
        bool | None, METHOD("--merge", help="Merge each dropped token into the most similar kept token.")
    ] = None

    @property
    def given(self) -> dict[str, str]:
        """The given options, as text of a method specification."""
        return {name: str(value).lower() for name, value in super().given.items()}

    def spec(self, method: str | None) -> str | None:
        """The specification of `method` with these options; None if nothing was given."""
        from pyramiddrop.method_spec import with_options

        return with_options(method or "pyramiddrop", self.given) if method or self.given else None


@dataclass(frozen=True)
class RequestOptions:
    """The request of `generate` and `visualize`: pictures, video and model."""

    image: Images = None
    video: Annotated[
        Path | None, WHAT(help="A video file, an animated GIF or WebP, or a folder of frames.", metavar="PATH")
    ] = None
    frames: Annotated[int, WHAT(min=1, help="How many evenly spaced frames of the video.")] = 8
    model: Model = None
    max_new_tokens: Annotated[int, HOW(min=1, help="Longest answer.")] = 128
    device: Device = None
    dtype: Dtype = None

    def prepare(self, prompt: str, spec: str | None) -> PreparedRequest:
        """Load the model that answers `prompt` under the specified method, and print warnings."""
        from pyramiddrop.inference.request import Request, prepare

        pictures = tuple(self.image or ())
        request = Request(prompt, pictures, self.model, spec, self.device, self.dtype, self.video, self.frames)
        with spinner(f"loading {self.model or 'the bundled model'}"):
            ready = prepare(request)
        for remark in ready.remarks:
            say(f"warning: {remark}")
        return ready


@dataclass(frozen=True)
class SizeOptions:
    """The sizes of a model and of a prompt."""

    shape: Annotated[str | None, SIZES(help="A named shape. (default: llava-1.5-7b)")] = None
    model: Annotated[str | None, SIZES(help="Folder or hub name of a checkpoint, to read its sizes.")] = None
    num_layers: Annotated[int | None, SIZES(help="Decoder layers.")] = None
    hidden: Annotated[int | None, SIZES(help="Width of the hidden states.")] = None
    intermediate: Annotated[int | None, SIZES(help="Width of the gated MLP.")] = None
    heads: Annotated[int | None, SIZES(help="Query heads. (default: 128 wide)")] = None
    kv_heads: Annotated[int | None, SIZES(help="Key and value heads. (default: as many as heads)")] = None
    visual_tokens: Annotated[int | None, PROMPT(help="Visual tokens. (default: the shape's)")] = None
    text_tokens: Annotated[int | None, PROMPT(help="All other tokens. (default: 64)")] = None
    crops: Annotated[int | None, PROMPT(help="Pictures for the vision encoder. (default: as needed)")] = None
    dtype: Annotated[str | None, SIZES(help="Of the KV cache. (default: the checkpoint's, or bfloat16)")] = None

    def sizes(self) -> Sizes:
        """The sizes that the options describe; InputError if they contradict each other."""
        from pyramiddrop.inference.sizes import choose_sizes

        return choose_sizes(**vars(self))


@dataclass(frozen=True)
class QuestionOptions(OptionGroup):
    """The questions of `eval` and the studies."""

    tasks: Annotated[str | None, WHAT(help="digits or reader; eval: tasks of lmms-eval, too. (default: digits)")] = None
    data: Annotated[Path | None, WHAT(help="Questions of your own: JSON or JSON lines.")] = None
    images: Annotated[Path | None, WHAT(help="Folder of the pictures of --data. (default: its own)")] = None
    metric: Annotated[str | None, WHAT(help="Of --data: exact, same or vqa. (default: exact)")] = None
    split: Annotated[str | None, WHAT(help="Of digits and reader: test, val or train. (default: test)")] = None
    seed: Annotated[int | None, WHAT(min=0, help="Of the pictures of digits and reader. (default: 0)")] = None
    limit: Annotated[int | None, WHAT(help="Ask so many questions at most.")] = None

    def task(self, answered: bool = True) -> Task:
        """Load the questions, each with a right answer if `answered`; InputError if they cannot be asked."""
        from pyramiddrop.evaluation.tasks import choose_task

        return choose_task(**vars(self), answered=answered)


@dataclass(frozen=True)
class AnswerOptions(OptionGroup):
    """How `eval` and the studies answer questions."""

    batch: Annotated[int | None, HOW(min=1, help="Questions of one forward. (default: 16; lmms-eval: 1)")] = None
    max_new_tokens: Annotated[int | None, HOW(min=1, help="Longest answer. (default: 32)")] = None
    device: Device = None
    dtype: Dtype = None


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let arguments of a command be groups whose fields become options of the command line.

    >>> @with_groups
    ... def cost(*, sizes: SizeOptions, as_json: AsJson = False) -> None: ...
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        own = inspect.signature(groups[name]).parameters.values() if name in groups else [parameter]
        types = get_type_hints(groups[name], include_extras=True) if name in groups else hints
        options += [one.replace(annotation=types[one.name], kind=inspect.Parameter.KEYWORD_ONLY) for one in own]

    @wraps(command)
    def call(**given: Any) -> None:
        built = {name: kind(**{one.name: given.pop(one.name) for one in fields(kind)}) for name, kind in groups.items()}
        command(**built, **given)

    call.__annotations__ = {option.name: option.annotation for option in options}
    call.__dict__["__signature__"] = inspect.Signature(options)  # the signature that Typer reads
    return call


class SpreadOptions(TyperCommand):
    """Lets repeatable options take several values: `--image a.png b.png`, as a shell expands `--image *.png`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        several = {option for parameter in self.params if parameter.multiple for option in parameter.opts}
        spread: list[str] = []
        for word in args:
            option = spread[-2] if len(spread) >= 2 and spread[-2] in several else None
            spread += [option, word] if option and not word.startswith("-") else [word]
        return super().parse_args(ctx, spread)


def numbers(name: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """Parse the comma-separated numbers of the option `name`; InputError for anything else."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name} must be {what} with commas between them; got {text!r}") from None
