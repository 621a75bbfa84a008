"""The cost model: what a prefill and a decode step cost, by named conventions, before anything has run."""

from pyramiddrop.cost.account import CONVENTIONS, Account, Cost, Parts, account
from pyramiddrop.cost.conventions import fastv_layer_flops, paper_layer_flops
from pyramiddrop.cost.flops import (
    Choice,
    Choosing,
    by_attention,
    head_flops,
    layer_flops,
    merging_flops,
    prefill_flops,
    projecting_flops,
    projector_flops,
    ranking_flops,
    step_flops,
    vision_flops,
)
from pyramiddrop.cost.memory import activation_bytes, kv_bytes, layer_kv_bytes
from pyramiddrop.cost.mixers import Mixer, delta_rule, grouped_attention, latent_attention, short_convolution
from pyramiddrop.cost.presets import PRESETS, Preset
from pyramiddrop.cost.shapes import BYTES, DecoderShape, Experts, ModelShape, Prompt, VisionShape

__all__ = [
    "BYTES",
    "CONVENTIONS",
    "PRESETS",
    "Account",
    "Choice",
    "Choosing",
    "Cost",
    "DecoderShape",
    "Experts",
    "Mixer",
    "ModelShape",
    "Parts",
    "Preset",
    "Prompt",
    "VisionShape",
    "account",
    "activation_bytes",
    "by_attention",
    "delta_rule",
    "fastv_layer_flops",
    "grouped_attention",
    "head_flops",
    "kv_bytes",
    "latent_attention",
    "layer_flops",
    "layer_kv_bytes",
    "merging_flops",
    "paper_layer_flops",
    "prefill_flops",
    "projecting_flops",
    "projector_flops",
    "ranking_flops",
    "short_convolution",
    "step_flops",
    "vision_flops",
]
