"""The verb `serve`: vLLM's or Transformers' OpenAI server, with dropping."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from pyramiddrop.cli.options import MethodOptions, OneMethod, with_groups
from pyramiddrop.cli.terminal import say

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
    from pyramiddrop.method_spec import method_label
    from pyramiddrop.report.units import arrow, share, size

    launch = prepare_launch(model, options.spec(method), context.args, backend)
    for note in launch.notes:
        say(note)
    saving, label = launch.saving, method_label(launch.method)
    if saving is None:
        say(f"{label}: the cost model does not know this text model")
    else:
        kept = arrow(dict.fromkeys(saving.pruned.visual_by_layer))
        say(
            f"{label}\nof a prompt with {saving.prompt.visual_tokens} visual tokens ({kept}) and "
            f"{saving.prompt.text_tokens} others: {share(saving.flops_ratio)} of the prefill's FLOPs, "
            f"{share(saving.kv_ratio)} of its KV cache ({size(saving.pruned.kv_bytes)} of "
            f"{size(saving.vanilla.kv_bytes)})"
        )
    if only_show:
        print(shlex.join(launch.command))
    else:
        launch.run()
