"""The verb `serve`: vLLM's or Transformers' OpenAI server, with dropping."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from pyramiddrop.cli.options import MethodOptions, OneMethod, with_groups
from pyramiddrop.cli.terminal import stderr

if TYPE_CHECKING:
    from pyramiddrop.inference.serving import Launch

#: Options that Typer does not know go to the server.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@with_groups
def serve(
    *,
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub name of a checkpoint.")],
    method: OneMethod = None,
    options: MethodOptions,
    backend: Annotated[
        str | None, typer.Option(help="vllm or transformers; without it vLLM, if that is installed.")
    ] = None,
    only_show: Annotated[
        bool, typer.Option("--show-command", help="Print the server's own command, and start nothing.")
    ] = False,
) -> None:
    """Serve a checkpoint with an OpenAI server, dropping visual tokens inside the language model.

    Every other option is that of `vllm serve` (or of `transformers serve`), e.g. --port 8000 --tensor-parallel-size 2.
    Without any option of a method: the one saved beside the checkpoint (pyramiddrop.json), or the paper's PyramidDrop.
    """
    from pyramiddrop.inference.serving import prepare_launch

    launch = prepare_launch(model, options.spec(method), context.args, backend)
    _say(launch)
    if only_show:
        print(shlex.join(launch.command))
    else:
        launch.run()


def _say(launch: Launch) -> None:
    from pyramiddrop.method_spec import method_label
    from pyramiddrop.report.units import arrow, share, size

    for note in launch.notes:
        stderr().print(note, soft_wrap=True)
    saving, method = launch.saving, method_label(launch.method)
    if saving is None:
        stderr().print(f"{method}: the cost model does not know this text model", soft_wrap=True)
        return
    kept = arrow(list(dict.fromkeys(saving.pruned.visual_by_layer)))
    stderr().print(
        f"{method}\nof a prompt with {saving.prompt.visual_tokens} visual tokens ({kept}) and "
        f"{saving.prompt.text_tokens} others: {share(saving.flops_ratio)} of the prefill's FLOPs, "
        f"{share(saving.kv_ratio)} of its KV cache ({size(saving.pruned.kv_bytes)} of {size(saving.vanilla.kv_bytes)})",
        soft_wrap=True,
    )
