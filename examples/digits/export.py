"""Writes a training state as a standard Hugging Face checkpoint: weights, configs, tokenizer, processor, chat template.

python examples/digits/export.py runs/digits/state.pt src/pyramiddrop/assets/digits
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from model import RMS_EPS, ROPE_BASE, ModelConfig, PackedLlava
from text import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, TOKEN_ID, USER, VOCABULARY, make_tokenizer
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

MARKS = {"bos_token_id": TOKEN_ID[BOS], "eos_token_id": TOKEN_ID[EOS], "pad_token_id": TOKEN_ID[PAD]}


def make_config(config: ModelConfig) -> LlavaConfig:
    """The same sizes in Hugging Face's words."""
    vision = CLIPVisionConfig(
        hidden_size=config.vision_hidden,
        intermediate_size=config.vision_inner,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=config.image,
        patch_size=config.patch,
        hidden_act="gelu_pytorch_tanh",
        projection_dim=config.vision_hidden,
    )
    text = LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.inner,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        rms_norm_eps=RMS_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        max_position_embeddings=config.positions,
        tie_word_embeddings=True,
        **MARKS,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_ID[IMAGE],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=config.visual_tokens,
        tie_word_embeddings=True,
        **MARKS,
    )


def to_hugging_face(model: PackedLlava) -> LlavaForConditionalGeneration:
    """The same weights in a ``LlavaForConditionalGeneration``; every weight of either side has its match."""
    exported = LlavaForConditionalGeneration(make_config(model.config))
    weights = renamed(model)
    result = exported.load_state_dict(weights, strict=False)
    # CLIP's last norm makes its pooled output, for which LLaVA has no use: it stays as it is initialised.
    missing = [name for name in result.missing_keys if "post_layernorm" not in name]
    if missing or result.unexpected_keys:
        raise RuntimeError(f"export does not fit: missing {missing}, unexpected {result.unexpected_keys}")
    exported.generation_config = GenerationConfig(max_new_tokens=8, do_sample=False, **MARKS)
    return exported.eval()


def renamed(model: PackedLlava) -> dict[str, Tensor]:
    """The model's weights under Hugging Face's names."""
    size = model.config.patch
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        owner, _, rest = name.partition(".")
        value = value.detach().clone()
        if name == "vision.patch_embedding.weight":
            weights["model.vision_tower.embeddings.patch_embedding.weight"] = value.view(-1, 3, size, size)
        elif owner == "vision":
            weights[f"model.vision_tower.{_vision_name(rest)}"] = value
        elif owner in ("linear_1", "linear_2"):
            weights[f"model.multi_modal_projector.{name}"] = value
        elif owner == "layers":
            weights[f"model.language_model.{_decoder_name(name)}"] = value
        elif owner == "norm":
            weights["model.language_model.norm.weight"] = value
        else:
            weights[f"model.language_model.{name}"] = weights["lm_head.weight"] = value
    return weights


def _vision_name(name: str) -> str:
    part = name.split(".")
    if part[0] in ("class_embedding", "position_embedding"):
        return f"embeddings.{name}"
    if part[0] == "pre_layrnorm":
        return name
    _, index, module, field = part
    block = {"fc": "mlp.", "la": ""}.get(module[:2], "self_attn.")
    return f"encoder.layers.{index}.{block}{module}.{field}"


def _decoder_name(name: str) -> str:
    _, index, module = name.split(".")[:3]
    if module.endswith("layernorm"):
        return f"{name}.weight"
    block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"layers.{index}.{block}.{module}.weight"


def make_processor(config: ModelConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaProcessor:
    """Resizes any picture to the canvas, maps it to [-1, 1], and puts one image token per patch into the prompt."""
    images = CLIPImageProcessorPil(
        size={"height": config.image, "width": config.image},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer or make_tokenizer(),
        patch_size=config.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def largest_difference(model: PackedLlava, exported: LlavaForConditionalGeneration, seed: int = 0) -> float:
    """The largest difference of a logit between the two models, on a random picture and random questions."""
    generator = torch.Generator().manual_seed(seed)
    config, slots, width = model.config, 3, 6
    pixels = torch.randn(1, 3, config.image, config.image, generator=generator)
    words = torch.randint(len(MARKS), config.vocabulary, (slots, width), generator=generator)
    words[words == TOKEN_ID[IMAGE]] = TOKEN_ID[BOS]
    ours = model(pixels, words.view(1, -1), model.packing(slots, width)).view(slots, width, -1)
    start = torch.tensor([TOKEN_ID[BOS], TOKEN_ID[USER]] + [TOKEN_ID[IMAGE]] * config.visual_tokens)
    prompts = torch.cat([start.expand(slots, -1), words], dim=1)
    theirs = exported(input_ids=prompts, pixel_values=pixels.expand(slots, -1, -1, -1)).logits[:, len(start) :]
    return (ours - theirs).abs().max().item()


def save_in_half(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write half-precision weights; a model loaded from them computes in single precision, as it was trained."""
    model.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    config = out / "config.json"
    words = json.loads(config.read_text("utf-8"))
    for part in (words, words["text_config"], words["vision_config"]):
        part["dtype"] = "float32"
    config.write_text(json.dumps(words, indent=2, sort_keys=True) + "\n", "utf-8")


def load_trained(path: Path) -> PackedLlava:
    """The model of a training state."""
    state = torch.load(path, weights_only=True)
    model = PackedLlava(ModelConfig(**state["config"]), start=[TOKEN_ID[BOS], TOKEN_ID[USER]])
    model.load_state_dict(state["model"])
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path, help="state.pt of train.py")
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    arguments = parser.parse_args()
    model = load_trained(arguments.state)
    if model.config.vocabulary != len(VOCABULARY):
        raise SystemExit("the state was trained with another vocabulary")
    exported = to_hugging_face(model)
    difference = largest_difference(model, exported)
    if difference > 1e-3:
        raise SystemExit(f"the exported model disagrees with the trained one: logits differ by {difference:.2g}")
    save_in_half(exported, arguments.out)
    make_processor(model.config).save_pretrained(arguments.out)
    size = sum(file.stat().st_size for file in arguments.out.iterdir()) / 1e6
    print(f"{arguments.out}: {size:.1f} MB, logits agree within {difference:.1g}")


if __name__ == "__main__":
    main()
