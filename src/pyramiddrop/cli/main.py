"""The command `pyramiddrop`: its verbs, and the options before a verb."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from pyramiddrop.cli import examples
from pyramiddrop.cli.bench import bench
from pyramiddrop.cli.cost import cost
from pyramiddrop.cli.demo import demo
from pyramiddrop.cli.eval import evaluate
from pyramiddrop.cli.families import families
from pyramiddrop.cli.generate import generate
from pyramiddrop.cli.methods import methods
from pyramiddrop.cli.options import SpreadOptions
from pyramiddrop.cli.plan import plan
from pyramiddrop.cli.serve import PASSED_ON, serve
from pyramiddrop.cli.study import study
from pyramiddrop.cli.terminal import OneLineErrors
from pyramiddrop.cli.train import train
from pyramiddrop.cli.visualize import visualize

app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=examples("demo"))(demo)
app.command(cls=SpreadOptions, epilog=examples("visualize"))(visualize)
app.command(cls=SpreadOptions, epilog=examples("generate"))(generate)
app.command(cls=SpreadOptions, epilog=examples("cost"))(cost)
app.command(epilog=examples("plan"))(plan)
app.command(cls=SpreadOptions, epilog=examples("bench"))(bench)
app.command("eval", cls=SpreadOptions, epilog=examples("eval"))(evaluate)
app.command(context_settings=PASSED_ON, epilog=examples("serve"))(serve)
app.command(epilog=examples("train"))(train)
app.command(epilog=examples("families"))(families)
app.command(epilog=examples("methods"))(methods)
app.add_typer(study, name="study", epilog=examples("study"))


def _show_version(asked: bool) -> None:
    if asked:
        print(f"pyramiddrop {version('pyramiddrop')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def pyramiddrop(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make vision-language models cheaper by dropping visual tokens inside the language model, in stages."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run the command line; never returns."""
    app(prog_name="pyramiddrop")
