"""A Space: ask a model about a picture without dropping and with PyramidDrop, and see what each stage keeps.

pip install pyramiddrop gradio
python examples/space/app.py                # the bundled model; a CPU is enough
MODEL=ID_OR_DIR python examples/space/app.py
"""

from __future__ import annotations

import os
from typing import Any

import gradio as gr
from matplotlib.figure import Figure
from PIL import Image

from pyramiddrop import PyramidDrop
from pyramiddrop.assets import demo_images, demo_questions, reader_checkpoint
from pyramiddrop.inference.answer import Comparison, compare
from pyramiddrop.inference.checkpoint import load_checkpoint
from pyramiddrop.inference.prompt import build_inputs
from pyramiddrop.report import visualize
from pyramiddrop.report.units import arrow, flops, seconds, share, size

CHECKPOINT = load_checkpoint(os.environ.get("MODEL", str(reader_checkpoint())))
EXAMPLES = [[str(path), entry["question"]] for path in demo_images() for entry in demo_questions()[path.name]]
HEADERS = ["", "without dropping", "PyramidDrop", "ratio"]
TITLE = "# PyramidDrop: fewer visual tokens in deeper layers"
ABOUT = """The language model is cut into four equal stages. Each one keeps the share λ of the visual tokens of the one
before, ranked by the attention of the question's last token. [pyramiddrop](https://github.com/pyramiddrop/pyramiddrop)
does this on unmodified Transformers. The bundled model knows drawn scenes, documents and charts alone: try the
examples."""


def answer(picture: Image.Image | None, question: str, lam: float) -> tuple[str, str, list[list[str]], Figure]:
    """Both answers, the table of costs, and the picture of the kept tokens."""
    if picture is None or not question.strip():
        raise gr.Error("Give a picture and a question.")
    inputs = build_inputs(CHECKPOINT.processor, [picture], question)
    done = compare(CHECKPOINT, inputs, PyramidDrop(lam=lam), max_new_tokens=32, runs=3)
    visual = visualize(done.trace, CHECKPOINT.model.config, CHECKPOINT.processor, [picture], inputs, question)
    return done.vanilla.answer, done.pruned.answer, costs(done), visual.draw()


def costs(done: Comparison) -> list[list[str]]:
    """The rows of the table."""
    plain, pruned = done.vanilla, done.pruned
    return [
        ["visual tokens", str(plain.usage.visual_tokens), arrow(pruned.usage.tokens_by_stage), ""],
        ["decoder FLOPs", flops(plain.usage.flops), flops(pruned.usage.flops), share(done.flops_ratio)],
        ["KV cache", size(plain.usage.kv_bytes), size(pruned.usage.kv_bytes), share(done.kv_ratio)],
        ["prefill", seconds(plain.prefill.wall), seconds(pruned.prefill.wall), share(done.time_ratio)],
    ]


def build() -> Any:
    """The page."""
    with gr.Blocks(title="PyramidDrop") as page:
        gr.Markdown(f"{TITLE}\n\n{ABOUT}")
        with gr.Row():
            with gr.Column(scale=1):
                picture = gr.Image(EXAMPLES[0][0], type="pil", label="Picture", height=300)
                question = gr.Textbox(EXAMPLES[0][1], label="Question")
                lam = gr.Slider(0.05, 1.0, 0.5, step=0.05, label="λ: the share that each drop keeps")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                gr.Examples(EXAMPLES, [picture, question])
            with gr.Column(scale=2):
                with gr.Row():
                    plain = gr.Textbox(label="Without dropping", interactive=False, elem_id="plain")
                    pruned = gr.Textbox(label="With PyramidDrop", interactive=False, elem_id="pruned")
                table = gr.Dataframe(headers=HEADERS, interactive=False, label="Cost of the prefill", elem_id="costs")
                kept = gr.Plot(show_label=False, elem_id="kept")
        gr.on([ask.click, question.submit, lam.release], answer, [picture, question, lam], [plain, pruned, table, kept])
    return page


if __name__ == "__main__":
    build().launch()
