"""Options that verbs share, each written once, alone or in groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from pyramiddrop.evaluation.tasks import Task
    from pyramiddrop.inference.sizes import Sizes

METHOD, WHAT, HOW, OUTPUT = "Method", "What is asked", "How", "Output"
SIZES, PROMPT = "Sizes of the model (one source)", "The prompt"

Model = Annotated[
    str | None,
    typer.Option(help="Folder or hub name of a checkpoint. (default: the bundled one)", rich_help_panel=WHAT),
]
Images = Annotated[
    list[Path] | None, typer.Option("--image", help="One or more pictures.", metavar="FILE...", rich_help_panel=WHAT)
]
Video = Annotated[
    Path | None,
    typer.Option(
        help="A video file, an animated GIF or WebP, or a folder of frames.", metavar="PATH", rich_help_panel=WHAT
    ),
]
Frames = Annotated[int, typer.Option(min=1, help="How many evenly spaced frames of the video.", rich_help_panel=WHAT)]
OneMethod = Annotated[
    str | None,
    typer.Option(
        help="pyramiddrop, fastv, random, uniform, ... or vanilla, with options: fastv:layer=3,keep=0.25. `pyramiddrop "
        "methods` lists them. (default: the saved one, or pyramiddrop)",
        rich_help_panel=METHOD,
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="One or more beside vanilla: pyramiddrop:lam=0.6 fastv:layer=3,keep=0.25 ... `pyramiddrop methods` lists "
        "them. (default: pyramiddrop and fastv)",
        metavar="METHOD...",
        rich_help_panel=METHOD,
    ),
]
Percents = Annotated[
    list[float] | None,
    typer.Option(
        "--percent",
        help="Solve the keep ratios of every method for so much of vanilla's decoder FLOPs; one or more.",
        metavar="PERCENT...",
        rich_help_panel=METHOD,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=HOW)]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. (default: the best there is)", rich_help_panel=HOW)]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float16, bfloat16, auto. (default: fits the device)", rich_help_panel=HOW),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=OUTPUT)]


@dataclass(frozen=True)
class MethodOptions:
    """Options of a method, beside `--method`: `--lam 0.6` for `:lam=0.6`."""

    lam: Annotated[
        str | None,
        typer.Option(
            help="λ: the share that each drop keeps of what is left.", metavar="NUMBER", rich_help_panel=METHOD
        ),
    ] = None
    stages: Annotated[
        str | None,
        typer.Option(
            help="Cut the model's layers into so many equal stages.", metavar="NUMBER", rich_help_panel=METHOD
        ),
    ] = None
    layers: Annotated[
        str | None, typer.Option(help="Drop before these layers: 8,16,24.", metavar="LIST", rich_help_panel=METHOD)
    ] = None
    keep: Annotated[
        str | None,
        typer.Option(
            help="Shares of the original visual tokens to keep: 0.5,0.25,0.125.", metavar="LIST", rich_help_panel=METHOD
        ),
    ] = None
    layer: Annotated[
        str | None, typer.Option(help="fastv: drop before this layer.", metavar="NUMBER", rich_help_panel=METHOD)
    ] = None
    positions: Annotated[
        str | None, typer.Option(help="original, or compact: renumber after a drop.", rich_help_panel=METHOD)
    ] = None
    score: Annotated[
        str | None,
        typer.Option(
            help="What ranks: attention, rope_free, diversity, ...; `pyramiddrop methods` lists them.",
            rich_help_panel=METHOD,
        ),
    ] = None
    reserve: Annotated[
        str | None,
        typer.Option(
            help="Share of the kept tokens that is evenly spaced over the picture.",
            metavar="NUMBER",
            rich_help_panel=METHOD,
        ),
    ] = None
    random_from: Annotated[
        str | None,
        typer.Option(
            help="Select tokens at random for drops before this layer and deeper ones.",
            metavar="NUMBER",
            rich_help_panel=METHOD,
        ),
    ] = None
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge", help="Merge each dropped token into the most similar kept token.", rich_help_panel=METHOD
        ),
    ] = None

    @property
    def given(self) -> dict[str, str]:
        """Those that were given, as a method in words has them."""
        return {name: str(value).lower() for name, value in asdict(self).items() if value is not None}

    def spec(self, method: str | None) -> str | None:
        """`method` with these options, in words; None where nothing was said."""
        from pyramiddrop.method_spec import with_options

        return with_options(method or "pyramiddrop", self.given) if method or self.given else None


@dataclass(frozen=True)
class SizeOptions:
    """The sizes of a model and of a prompt."""

    shape: Annotated[str | None, typer.Option(help="A named shape. (default: llava-1.5-7b)", rich_help_panel=SIZES)] = (
        None
    )
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a checkpoint; only its config.json is read.", rich_help_panel=SIZES),
    ] = None
    num_layers: Annotated[int | None, typer.Option(help="Decoder layers.", rich_help_panel=SIZES)] = None
    hidden: Annotated[int | None, typer.Option(help="Width of the hidden states.", rich_help_panel=SIZES)] = None
    intermediate: Annotated[int | None, typer.Option(help="Width of the gated MLP.", rich_help_panel=SIZES)] = None
    heads: Annotated[int | None, typer.Option(help="Query heads. (default: 128 wide)", rich_help_panel=SIZES)] = None
    kv_heads: Annotated[
        int | None, typer.Option(help="Key and value heads. (default: as many as heads)", rich_help_panel=SIZES)
    ] = None
    visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens. (default: the shape's)", rich_help_panel=PROMPT)
    ] = None
    text_tokens: Annotated[int | None, typer.Option(help="All other tokens. (default: 64)", rich_help_panel=PROMPT)] = (
        None
    )
    crops: Annotated[
        int | None,
        typer.Option(
            help="Pictures that the vision encoder sees. (default: as the tokens need)", rich_help_panel=PROMPT
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the KV cache. (default: the checkpoint's, or bfloat16)", rich_help_panel=SIZES),
    ] = None

    def sizes(self) -> Sizes:
        """What they name; InputError where they contradict each other."""
        from pyramiddrop.inference.sizes import SizeOptions, choose_sizes

        return choose_sizes(SizeOptions(**asdict(self)))


@dataclass(frozen=True)
class QuestionOptions:
    """Which questions `eval` and the studies ask."""

    tasks: Annotated[
        str | None,
        typer.Option(
            help="A bundled benchmark, digits or reader; eval takes tasks of lmms-eval, too: mme,pope. "
            "(default: digits)",
            rich_help_panel=WHAT,
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(help="Questions of your own: JSON or JSON lines, see docs/evaluation.md.", rich_help_panel=WHAT),
    ] = None
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures of --data. (default: its own)", rich_help_panel=WHAT)
    ] = None
    metric: Annotated[
        str | None, typer.Option(help="Of --data: exact, same or vqa. (default: exact)", rich_help_panel=WHAT)
    ] = None
    split: Annotated[
        str | None,
        typer.Option(help="Of digits and reader: test, val or train. (default: test)", rich_help_panel=WHAT),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of the pictures of digits and reader. (default: 0)", rich_help_panel=WHAT),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Ask so many questions at most.", rich_help_panel=WHAT)] = None

    def task(self, answered: bool = True) -> Task:
        """The questions; `answered` says whether each needs a right answer. InputError for what cannot be asked."""
        from pyramiddrop.evaluation.tasks import choose_task

        return choose_task(**asdict(self), answered=answered)


@dataclass(frozen=True)
class AnswerOptions:
    """How `eval` and the studies have them answered."""

    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Questions of one forward. (default: 16; 1 for lmms-eval)", rich_help_panel=HOW),
    ] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. (default: 32)", rich_help_panel=HOW)
    ] = None
    device: Device = None
    dtype: Dtype = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let arguments of a command be groups: the command line has their fields as options.

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
    call.__dict__["__signature__"] = inspect.Signature(options)  # what Typer reads
    return call


class SpreadOptions(TyperCommand):
    """Lets `--image a.png b.png` mean `--image a.png --image b.png`, as a shell's `--image *.png` writes it."""

    # Of every option that may be repeated.

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        several = {option for parameter in self.params if parameter.multiple for option in parameter.opts}
        spread: list[str] = []
        for word in args:
            option = spread[-2] if len(spread) >= 2 and spread[-2] in several else None
            spread += [option, word] if option and not word.startswith("-") else [word]
        return super().parse_args(ctx, spread)


def numbers(name: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """The numbers of the option `name`, which are written with commas between them; InputError for anything else."""
    from pyramiddrop.inference.errors import InputError

    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name} must be {what} with commas between them; got {text!r}") from None
