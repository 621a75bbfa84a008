"""The two published ways to count FLOPs: visual tokens alone, a multiply-add as one.

`paper` is PyramidDrop's (arXiv 2410.17247, for LLaMA's gated MLP), `fastv` is FastV's (arXiv 2403.06764, for an MLP of
two matrices). In a layer with n visual tokens, hidden width d and MLP width m they count
4nd² + 2n²d + 3ndm and 4nd² + 2n²d + 2ndm. Neither knows grouped queries, text, the head or the ranking.
"""

from __future__ import annotations

from pyramiddrop.cost.shapes import DecoderShape


def paper_layer_flops(shape: DecoderShape, visual: int, layer: int = 0) -> int:
    """4nd² + 2n²d + 3ndm of a layer with `visual` tokens."""
    return _published(shape, visual, layer, matrices=3)


def fastv_layer_flops(shape: DecoderShape, visual: int, layer: int = 0) -> int:
    """4nd² + 2n²d + 2ndm of a layer with `visual` tokens."""
    return _published(shape, visual, layer, matrices=2)


def _published(shape: DecoderShape, visual: int, layer: int, matrices: int) -> int:
    hidden = shape.hidden
    return visual * hidden * (4 * hidden + 2 * visual + matrices * shape.mlp_width(layer, visual=True))
