"""A lit spot in the families whose processors need torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig
from transformers.models.cohere2_vision.image_processing_cohere2_vision import Cohere2VisionImageProcessor
from transformers.models.cohere2_vision.processing_cohere2_vision import Cohere2VisionProcessor
from transformers.models.gemma4_unified.image_processing_gemma4_unified import Gemma4UnifiedImageProcessor
from transformers.models.gemma4_unified.processing_gemma4_unified import Gemma4UnifiedProcessor
from transformers.models.gemma4_unified.video_processing_gemma4_unified import Gemma4UnifiedVideoProcessor
from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor
from transformers.models.kimi_k25.processing_kimi_k25 import Kimi_K25Processor
from transformers.models.lfm2_vl.image_processing_lfm2_vl import Lfm2VlImageProcessor
from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor
from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor
from transformers.models.llama4.processing_llama4 import Llama4Processor
from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.models.muse_glimmer.image_processing_muse_glimmer import MuseGlimmerImageProcessor
from transformers.models.perception_lm.image_processing_perception_lm import PerceptionLMImageProcessor
from transformers.models.perception_lm.processing_perception_lm import PerceptionLMProcessor
from transformers.models.perception_lm.video_processing_perception_lm import PerceptionLMVideoProcessor
from transformers.models.phi4_multimodal.image_processing_phi4_multimodal import Phi4MultimodalImageProcessor
from transformers.models.phi4_multimodal.processing_phi4_multimodal import Phi4MultimodalProcessor
from transformers.models.pixtral.image_processing_pixtral import PixtralImageProcessor
from transformers.models.pixtral.processing_pixtral import PixtralProcessor
from transformers.models.step3p7.image_processing_step3p7 import Step3p7ImageProcessor
from transformers.models.step3p7.processing_step3p7 import Step3p7Processor

from pyramiddrop.inference.prompt import image_token
from pyramiddrop.report.token_layout.views import place_pictures
from spot_probe import SIZES, SPOTS, assert_lit, lit, token_light, word_tokenizer
from spot_probe_families import SLACK, gemma_tokenizer
from spot_probe_grids import grid_inputs, stand_in
from zoo import MEMBERS, weights
from zoo.vision import END, IMAGE, LINE, SIDE, START, TOWER, VIDEO
from zoo.weights import TEXT, drawn

Made = tuple[Any, Any]
SQUARE = {"height": SIDE, "width": SIDE}


def cohere2_vision() -> Made:
    tokenizer = word_tokenizer(
        {"<image>": IMAGE, "<boi>": START, "<eoi>": END, "<line>": LINE},
        image_token="<image>",
        boi_token="<boi>",
        eoi_token="<eoi>",
        img_line_break_token="<line>",
    )
    images = Cohere2VisionImageProcessor(size=SQUARE, patch_size=2)  # tokens on a side of a tile, and no pixels
    return MEMBERS["cohere2_vision"].build(0), Cohere2VisionProcessor(images, tokenizer)


def gemma4_unified() -> Made:
    images = Gemma4UnifiedImageProcessor(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    videos = Gemma4UnifiedVideoProcessor()
    with patch("transformers.processing_utils.ProcessorMixin.check_argument_for_proper_class"):
        processor = Gemma4UnifiedProcessor(None, images, gemma_tokenizer(), videos)
    return MEMBERS["gemma4_unified"].build(0), processor


def kimi_k25() -> Made:
    tokenizer = word_tokenizer({"<image>": weights.IMAGE, "<video>": weights.VIDEO}, image_token="<image>")
    images = Kimi_K25ImageProcessor(patch_size=4, size={"max_height": 16, "max_width": 16}, max_patches=256)
    with patch("transformers.processing_utils.ProcessorMixin.check_argument_for_proper_class"):
        return MEMBERS["kimi_k25"].build(0), Kimi_K25Processor(images, tokenizer)


def lfm2_vl() -> Made:
    ids = {"<image>": weights.IMAGE, "<|image_start|>": START, "<|image_end|>": END, "<|img_thumbnail|>": LINE}
    settings = {"min_image_tokens": 4, "max_image_tokens": 16, "tile_size": 32, "max_tiles": 6}
    images = Lfm2VlImageProcessor(encoder_patch_size=4, **settings)
    return MEMBERS["lfm2_vl"].build(0), Lfm2VlProcessor(images, word_tokenizer(ids, image_token="<image>"))


def llama4() -> Made:
    ids = {"<|patch|>": IMAGE, "<|image_start|>": START, "<|image_end|>": END, "<|image|>": 192}
    tokenizer = word_tokenizer(ids | {"<|tile_x_separator|>": 190, "<|tile_y_separator|>": 191})
    images = Llama4ImageProcessor(size=SQUARE, max_patches=4)
    return MEMBERS["llama4"].build(0), Llama4Processor(images, tokenizer, patch_size=SIDE // 4)


def perception_lm() -> Made:
    tokenizer = word_tokenizer({"<image>": IMAGE, "<video>": VIDEO}, image_token="<image>", video_token="<video>")
    images = PerceptionLMImageProcessor(tile_size=56, size={"height": 56, "width": 56}, vision_input_type="thumb+tile")
    return MEMBERS["perception_lm"].build(0), PerceptionLMProcessor(
        PerceptionLMVideoProcessor(), images, tokenizer, patch_size=7
    )


def molmo2() -> Made:
    ids = {"<im_patch>": IMAGE, "<im_col>": LINE, "<im_start>": START, "<im_end>": END, "<low_res_im_start>": 190}
    tokenizer = word_tokenizer(ids | {"<|image|>": 189, "<|video|>": 188, "<frame_start>": 191, "<frame_end>": 192})
    images = Molmo2ImageProcessor(size=SQUARE, patch_size=7, overlap_margins=[1, 1], max_crops=6)
    with patch("transformers.processing_utils.ProcessorMixin.check_argument_for_proper_class"):
        return MEMBERS["molmo2"].build(0), Molmo2Processor(images, None, tokenizer)


def step3p7() -> Made:
    ids = {"<im_patch>": weights.IMAGE, "<patch_start>": 194, "<patch_end>": 195, "<patch_newline>": 196}
    tokenizer = word_tokenizer(ids | {"<im_start>": weights.START, "<im_end>": weights.END})
    images = Step3p7ImageProcessor(size={"height": 64, "width": 64}, patch_size=32, vision_patch_size=4)
    return MEMBERS["step3p7"].build(0), Step3p7Processor(images, tokenizer)


class _SmallPhi4Processor(Phi4MultimodalProcessor):  # type: ignore[misc]
    """The family's image processor counts 16 x 16 tokens of the whole, whatever its size: here they are 4 x 4."""

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **settings: Any) -> str:
        counted = image_inputs["num_img_tokens"][image_idx] - 16 * 17 + 4 * 5
        return str(self.image_token) * counted


def phi4_multimodal() -> Made:
    tokenizer = word_tokenizer({"<image>": weights.IMAGE, "<audio>": 198}, image_token="<image>", audio_token="<audio>")
    images = Phi4MultimodalImageProcessor(size={"height": 32, "width": 32}, patch_size=4, dynamic_hd=6)
    with patch("transformers.processing_utils.ProcessorMixin.check_argument_for_proper_class"):
        return MEMBERS["phi4_multimodal"].build(0), _SmallPhi4Processor(images, None, tokenizer)


def _pixtral(merge: int) -> Any:
    tokenizer = word_tokenizer({"[IMG]": IMAGE, "[IMG_BREAK]": LINE, "[IMG_END]": END})
    images = PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 7, "width": 7})
    return PixtralProcessor(images, tokenizer, patch_size=7, spatial_merge_size=merge)


def mistral3() -> Made:
    return MEMBERS["mistral3"].build(0), _pixtral(2)


def pixtral() -> Made:
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**TOWER | {"image_size": 56}, head_dim=16),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return drawn(lambda: LlavaForConditionalGeneration(config), 0), _pixtral(1)


_MADE = (
    cohere2_vision,
    gemma4_unified,
    kimi_k25,
    lfm2_vl,
    llama4,
    mistral3,
    molmo2,
    perception_lm,
    phi4_multimodal,
    pixtral,
    step3p7,
)
FAMILIES: dict[str, Callable[[], Made]] = {made.__name__: made for made in _MADE}
SHAPES = pytest.mark.parametrize("size", SIZES, ids=["square", "wide", "tall"])


@SHAPES
@pytest.mark.parametrize("family", FAMILIES)
def test_stills(family: str, size: tuple[int, int]) -> None:
    model, processor = FAMILIES[family]()
    for place in SPOTS:
        picture = lit(size, place)
        inputs, dark = (
            processor(images=[one], text=[f"w5 {image_token(processor)} w7"], return_tensors="pt")
            for one in (picture, lit(size, (-9, -9)))
        )
        seen = place_pictures(model.config, processor, [picture], inputs)
        assert assert_lit(seen, token_light(model, inputs, dark), place, SLACK.get(family, 0.2))


@SHAPES
def test_muse_glimmer(size: tuple[int, int]) -> None:
    model, processor = MEMBERS["muse_glimmer"].build(0), MuseGlimmerImageProcessor(patch_size=4)
    for place in SPOTS:
        picture = lit(size, place)
        inputs, dark = (grid_inputs("muse_glimmer", model, processor, one) for one in (picture, lit(size, (-9, -9))))
        seen = place_pictures(model.config, stand_in(processor), [picture], inputs)
        assert assert_lit(seen, token_light(model, inputs, dark), place)
