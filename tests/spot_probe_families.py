"""Tiny models with the processors of their families, as far as those run without torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from transformers import CLIPImageProcessorPil, LlavaProcessor, SiglipImageProcessorPil
from transformers.models.aya_vision.processing_aya_vision import AyaVisionProcessor
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.chameleon.processing_chameleon import ChameleonProcessor
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl.processing_deepseek_vl import DeepseekVLProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.gemma3n.processing_gemma3n import Gemma3nProcessor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.got_ocr2.processing_got_ocr2 import GotOcr2Processor
from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil
from transformers.models.granite_docling.processing_granite_docling import GraniteDoclingProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.processing_janus import JanusProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_next_video.processing_llava_next_video import LlavaNextVideoProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.ovis2.processing_ovis2 import Ovis2Processor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.qianfan_ocr.processing_qianfan_ocr import QianfanOCRProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor
from transformers.models.video_llava.processing_video_llava import VideoLlavaProcessor

from spot_probe import wide_gemma4, word_tokenizer
from zoo import MEMBERS, weights
from zoo.llava_like import PINPOINTS
from zoo.tiled import GLOBAL, INDICATORS, TILE
from zoo.vision import END, IMAGE, LINE, SIDE, START, VIDEO

Made = tuple[Any, Any]


def _side(pixels: int) -> dict[str, int]:
    return {"height": pixels, "width": pixels}


SQUARE = _side(SIDE)


def _model(name: str) -> Any:
    return MEMBERS[name].build(0)


def _processor(kind: Any, *parts: Any, **settings: Any) -> Any:
    """Made without a look at the classes of its parts: that of a video processor needs torchvision."""
    with patch.object(kind, "check_argument_for_proper_class"):
        return kind(*parts, **settings)


def _llava(name: str, images: Any = None) -> Made:
    settings = {"patch_size": SIDE // 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    images = images or CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return _model(name), LlavaProcessor(images, word_tokenizer({"<image>": IMAGE}), **settings)


def llava() -> Made:
    return _llava("llava")


def vipllava() -> Made:
    return _llava("vipllava")


def fast_vlm() -> Made:
    side = _side(32)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)
    tokenizer = word_tokenizer({"<image>": IMAGE})
    return _model("fast_vlm"), LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="full")


def video_llava() -> Made:
    images = VideoLlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    tokenizer = word_tokenizer({"<image>": IMAGE, "<video>": VIDEO})
    return _model("video_llava"), _processor(VideoLlavaProcessor, images, None, tokenizer, patch_size=SIDE // 4)


def _anyres() -> dict[str, Any]:
    return {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS}


def llava_next() -> Made:
    settings = {"patch_size": SIDE // 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    images, tokenizer = LlavaNextImageProcessorPil(**_anyres()), word_tokenizer({"<image>": IMAGE})
    return _model("llava_next"), LlavaNextProcessor(images, tokenizer, **settings)


def llava_next_video() -> Made:
    settings = {"patch_size": SIDE // 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    images, tokenizer = LlavaNextImageProcessorPil(**_anyres()), word_tokenizer({"<image>": IMAGE, "<video>": VIDEO})
    return _model("llava_next_video"), _processor(LlavaNextVideoProcessor, None, images, tokenizer, **settings)


def _onevision(most: int) -> Made:
    images = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=PINPOINTS, size=SQUARE)
    tokenizer = word_tokenizer({"<image>": IMAGE, "<video>": VIDEO})
    settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    model, aspect = _model("llava_onevision"), f"anyres_max_{most}"
    model.config.vision_aspect_ratio = aspect
    return model, _processor(LlavaOnevisionProcessor, images, tokenizer, vision_aspect_ratio=aspect, **settings)


def llava_onevision() -> Made:
    return _onevision(9)


def llava_onevision_shrunk() -> Made:
    """Three tiles' worth of tokens are too many."""
    return _onevision(1)


class _Brightest(torch.nn.Module):
    """In the place of Chameleon's encoder, whose norms mix all places: 1 at the brightest one of (B, 3, H, W)."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        light = torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 2)
        return ((light == light.amax()) & (light > light.amin())).float().expand(-1, 8, -1, -1)


def chameleon() -> Made:
    model, images = _model("chameleon"), ChameleonImageProcessorPil(size={"shortest_edge": 8}, crop_size=_side(8))
    coder = model.model.vqmodel
    coder.encoder, coder.quant_conv = _Brightest(), torch.nn.Identity()
    codes = coder.quantize.embedding.weight.data
    codes[:] = 100
    codes[:2] = torch.tensor([[0.0], [1.0]])
    tokenizer = word_tokenizer({"<image>": IMAGE, "<boi>": START, "<eoi>": END}, boi_token="<boi>", eoi_token="<eoi>")
    return model, ChameleonProcessor(images, tokenizer, image_seq_length=16)


def deepseek_vl() -> Made:
    images = DeepseekVLImageProcessorPil(size=SQUARE)
    tokenizer = word_tokenizer({"<image>": IMAGE}, image_token="<image>")
    return _model("deepseek_vl"), DeepseekVLProcessor(images, tokenizer, num_image_tokens=16)


def janus() -> Made:
    tokenizer = word_tokenizer(
        {"<image>": IMAGE, "<boi>": START, "<eoi>": END}, image_token="<image>", boi_token="<boi>", eoi_token="<eoi>"
    )
    return _model("janus"), JanusProcessor(JanusImageProcessorPil(size=SQUARE), tokenizer, num_image_tokens=16)


def _context_tokenizer() -> Any:
    return word_tokenizer(
        {"<context>": IMAGE, "<img>": START, "</img>": END, "<video>": LINE, "<image>": TILE},
        context_image_token="<context>",
        start_image_token="<img>",
        end_image_token="</img>",
        video_token="<video>",
    )


def internvl() -> Made:
    images = GotOcr2ImageProcessorPil(size=SQUARE)
    return _model("internvl"), _processor(InternVLProcessor, images, _context_tokenizer(), image_seq_length=4)


def qianfan_ocr() -> Made:
    images = GotOcr2ImageProcessorPil(size=SQUARE)
    return _model("qianfan_ocr"), _processor(QianfanOCRProcessor, images, _context_tokenizer(), image_seq_length=4)


def _named_tiles() -> dict[str, int]:
    return {"<image>": IMAGE, "<fake_token_around_image>": START, "<global-img>": GLOBAL}


def idefics3() -> Made:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 3 * SIDE}, max_image_size={"longest_edge": SIDE})
    tokenizer = word_tokenizer(_named_tiles() | {"<end_of_utterance>": END})
    return _model("idefics3"), Idefics3Processor(images, tokenizer, image_seq_len=4)


def smolvlm() -> Made:
    images = SmolVLMImageProcessorPil(size={"longest_edge": 3 * SIDE}, max_image_size={"longest_edge": SIDE})
    tokenizer = word_tokenizer(
        _named_tiles(),
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )
    with patch("transformers.models.smolvlm.processing_smolvlm.num2words", str):  # it is asked for, and counts frames
        return _model("smolvlm"), _processor(SmolVLMProcessor, images, tokenizer, None, image_seq_len=4)


def granite_docling() -> Made:
    images = GraniteDoclingImageProcessorPil(size=_side(32), max_patches=6)
    tokenizer = word_tokenizer(_named_tiles() | {"<image>": weights.IMAGE}, image_token="<image>")
    return _model("granite_docling"), GraniteDoclingProcessor(images, tokenizer, image_seq_len=4)


def aya_vision() -> Made:
    ids = {"<|IMG_PATCH|>": IMAGE, "<|START_OF_IMG|>": START, "<|END_OF_IMG|>": END, "TILE_GLOBAL": GLOBAL}
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True)
    settings = {"patch_size": SIDE // 4, "img_size": SIDE, "downsample_factor": 2}
    return _model("aya_vision"), AyaVisionProcessor(images, word_tokenizer(ids), **settings)


def ovis2() -> Made:
    names = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    ids = dict(zip(names, INDICATORS, strict=True)) | {"<IMG_ATOM>": IMAGE, "<image>": TILE}
    images = Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=True)
    return _model("ovis2"), Ovis2Processor(images, word_tokenizer(ids), image_seq_length=4)


def got_ocr2() -> Made:
    images = GotOcr2ImageProcessorPil(size=_side(64))
    tokenizer = word_tokenizer({"<imgpad>": IMAGE, "<img>": START, "</img>": END})
    model, processor = _model("got_ocr2"), GotOcr2Processor(images, tokenizer)
    processor.num_image_tokens = 16
    return model, processor


def gemma_tokenizer() -> Any:
    """With the marks of Gemma 3, 3n and 4."""
    return word_tokenizer(
        {"<soft>": IMAGE, "<boi>": START, "<eoi>": END, "<|video|>": VIDEO, "<audio>": 180, "<boa>": 181, "<eoa>": 182},
        image_token="<soft>",
        boi_token="<boi>",
        eoi_token="<eoi>",
        audio_token="<audio>",
        boa_token="<boa>",
        eoa_token="<eoa>",
    )


def _gemma3(**settings: Any) -> Made:
    images = Gemma3ImageProcessorPil(size=_side(2 * SIDE), **settings)
    return _model("gemma3"), Gemma3Processor(images, gemma_tokenizer(), image_seq_length=16)


def gemma3() -> Made:
    return _gemma3()


def gemma3_pan_and_scan() -> Made:
    return _gemma3(do_pan_and_scan=True)


def gemma3n() -> Made:
    images = SiglipImageProcessorPil(size=_side(32))
    return _model("gemma3n"), _processor(Gemma3nProcessor, None, images, gemma_tokenizer(), image_seq_length=16)


def gemma4() -> Made:
    images = Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    parts = {"feature_extractor": None, "image_processor": images, "video_processor": None}
    processor = _processor(Gemma4Processor, tokenizer=gemma_tokenizer(), **parts)
    return wide_gemma4(_model("gemma4")), processor


def paligemma() -> Made:
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 16
    return _model("paligemma"), PaliGemmaProcessor(images, word_tokenizer({"<image>": IMAGE}, image_token="<image>"))


#: They see the middle of a picture alone.
CENTRED = ("chameleon", "fast_vlm", "llava", "video_llava", "vipllava")

#: How far beside a token's cell its light may lie: the convolutions of GOT-OCR2's and Step 3.7's towers reach beyond
#: it, and norms of Gemma 4's bare patches make a little light look like much.
SLACK = {"got_ocr2": 0.5, "step3p7": 0.5, "gemma4_unified": 0.5}

FAMILIES: dict[str, Callable[[], Made]] = {
    made.__name__: made
    for made in (
        aya_vision,
        chameleon,
        deepseek_vl,
        fast_vlm,
        gemma3,
        gemma3_pan_and_scan,
        gemma3n,
        gemma4,
        got_ocr2,
        granite_docling,
        idefics3,
        internvl,
        janus,
        llava,
        llava_next,
        llava_next_video,
        llava_onevision,
        llava_onevision_shrunk,
        ovis2,
        paligemma,
        qianfan_ocr,
        smolvlm,
        video_llava,
        vipllava,
    )
}
