"""A lit spot in one frame of a video: the token with the most light is of that frame, and its place covers the spot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
from transformers.models.cohere_compass.processing_cohere_compass import CohereCompassProcessor
from transformers.models.cohere_compass.video_processing_cohere_compass import CohereCompassVideoProcessor
from transformers.models.cosmos3_edge.processing_cosmos3_edge import Cosmos3EdgeProcessor
from transformers.models.cosmos3_edge.video_processing_cosmos3_edge import Cosmos3EdgeVideoProcessor
from transformers.models.exaone4_5.processing_exaone4_5 import Exaone4_5_Processor
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor
from transformers.models.gemma4_unified.processing_gemma4_unified import Gemma4UnifiedProcessor
from transformers.models.gemma4_unified.video_processing_gemma4_unified import Gemma4UnifiedVideoProcessor
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.models.glm46v.processing_glm46v import Glm46VProcessor
from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor
from transformers.models.glmga.video_processing_glmga import GlmgaVideoProcessor
from transformers.models.hyperclovax_vision_v2.processing_hyperclovax_vision_v2 import HyperCLOVAXVisionV2Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.lfm3_vl.processing_lfm3_vl import Lfm3VlProcessor
from transformers.models.llava_next_video.processing_llava_next_video import LlavaNextVideoProcessor
from transformers.models.llava_next_video.video_processing_llava_next_video import LlavaNextVideoVideoProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor
from transformers.models.muse_glimmer.processing_muse_glimmer import MuseGlimmerProcessor
from transformers.models.muse_glimmer.video_processing_muse_glimmer import MuseGlimmerVideoProcessor
from transformers.models.perception_lm.processing_perception_lm import PerceptionLMProcessor
from transformers.models.perception_lm.video_processing_perception_lm import PerceptionLMVideoProcessor
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.models.video_llava.processing_video_llava import VideoLlavaProcessor
from transformers.models.video_llava.video_processing_video_llava import VideoLlavaVideoProcessor

from pyramiddrop.inference.video import default_metadata
from pyramiddrop.report.token_layout.views import PlacedView, place_pictures
from spot_probe import SIZES, SPOTS, lit, token_light, wide_gemma4, word_tokenizer
from spot_probe_families import SLACK, gemma_tokenizer
from zoo import MEMBERS, vision, weights
from zoo.tiled import GLOBAL
from zoo.vision import SIDE

Made = tuple[Any, Any]
SQUARE = {"height": SIDE, "width": SIDE}
FRAMES = 5
DARK = (-9, -9)
SIZE = {"shortest_edge": 1024, "longest_edge": 4096}


def _processor(kind: Any, **parts: Any) -> Any:
    """Made without a check of the classes of its parts, of which some are not there."""
    with patch("transformers.processing_utils.ProcessorMixin.check_argument_for_proper_class"):
        return kind(**parts)


def _marks(image: str, video: str, start: str, end: str, **more: int) -> Any:
    ids = {image: weights.IMAGE, video: weights.VIDEO, start: weights.START, end: weights.END} | more
    return word_tokenizer(ids, image_token=image, video_token=video)


def _grid(family: str, kind: Any, videos: Any, tokenizer: Any, **settings: Any) -> Made:
    parts = {"image_processor": None, "video_processor": videos(patch_size=4, size=SIZE, **settings)}
    return MEMBERS[family].build(0), _processor(kind, tokenizer=tokenizer, **parts)


def _qwen(family: str, kind: Any, videos: Any) -> Made:
    tokenizer = _marks("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return _grid(family, kind, videos, tokenizer)


def _glm(family: str, kind: Any, videos: Any) -> Made:
    more = {"<|begin_of_video|>": 194, "<|end_of_video|>": 195}
    tokenizer = _marks("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", **more)
    return _grid(family, kind, videos, tokenizer)


def cohere_compass() -> Made:
    tokenizer = _marks("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>")
    return _grid("cohere_compass", CohereCompassProcessor, CohereCompassVideoProcessor, tokenizer)


def _omni(family: str, kind: Any, videos: Any) -> Made:
    more = {"<|audio|>": 180, "<|audio_bos|>": 181, "<|audio_eos|>": 182}
    ids = {"<|image|>": weights.IMAGE, "<|video|>": weights.VIDEO, "<|bos|>": weights.START, "<|eos|>": weights.END}
    tokenizer = word_tokenizer(
        ids | more,
        image_token="<|image|>",
        video_token="<|video|>",
        audio_token="<|audio|>",
        vision_bos_token="<|bos|>",
        vision_eos_token="<|eos|>",
        audio_bos_token="<|audio_bos|>",
        audio_eos_token="<|audio_eos|>",
    )
    return _grid(family, partial(kind, feature_extractor=None), videos, tokenizer)


def molmo2() -> Made:
    ids = {"<im_patch>": vision.IMAGE, "<|video|>": 188, "<|image|>": 189, "<frame_start>": 191, "<frame_end>": 192}
    parts = {"image_processor": None, "tokenizer": word_tokenizer(ids)}
    videos = Molmo2VideoProcessor(size=SQUARE, patch_size=7, pooling_size=[2, 2])
    return MEMBERS["molmo2"].build(0), _processor(Molmo2Processor, video_processor=videos, **parts)


def muse_glimmer() -> Made:
    more = {"<|vid_frame_separator|>": 194, "<|image_start|>": 195, "<|image_end|>": 196}
    tokenizer = _marks("<|patch|>", "<|video|>", "<|vid_start|>", "<|vid_end|>", **more)
    return _grid("muse_glimmer", MuseGlimmerProcessor, MuseGlimmerVideoProcessor, tokenizer)


def _llava_tokenizer() -> Any:
    return word_tokenizer(
        {"<image>": vision.IMAGE, "<video>": vision.VIDEO}, image_token="<image>", video_token="<video>"
    )


def _llava(family: str, kind: Any, videos: Any, **settings: Any) -> Made:
    parts = {"image_processor": None, "video_processor": videos, "tokenizer": _llava_tokenizer()}
    return MEMBERS[family].build(0), _processor(kind, **parts, **settings)


def llava_onevision() -> Made:
    settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return _llava("llava_onevision", LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor(size=SQUARE), **settings)


def llava_next_video() -> Made:
    videos = LlavaNextVideoVideoProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return _llava("llava_next_video", LlavaNextVideoProcessor, videos, patch_size=SIDE // 4)


def video_llava() -> Made:
    videos = VideoLlavaVideoProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return _llava("video_llava", VideoLlavaProcessor, videos, patch_size=SIDE // 4)


def perception_lm() -> Made:
    videos = PerceptionLMVideoProcessor(size={"height": 56, "width": 56})
    return _llava("perception_lm", PerceptionLMProcessor, videos, patch_size=7)


def _gemma(family: str, kind: Any, videos: Any) -> Made:
    parts = {"feature_extractor": None, "image_processor": None, "tokenizer": gemma_tokenizer()}
    cut = videos(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    return MEMBERS[family].build(0), _processor(kind, video_processor=cut, **parts)


def gemma4() -> Made:
    model, processor = _gemma("gemma4", Gemma4Processor, Gemma4VideoProcessor)
    return wide_gemma4(model), processor


def gemma4_unified() -> Made:
    return _gemma("gemma4_unified", Gemma4UnifiedProcessor, Gemma4UnifiedVideoProcessor)


def internvl() -> Made:
    tokenizer = word_tokenizer(
        {"<context>": vision.IMAGE, "<img>": vision.START, "</img>": vision.END, "<video>": vision.LINE},
        context_image_token="<context>",
        start_image_token="<img>",
        end_image_token="</img>",
        video_token="<video>",
    )
    parts = {"image_processor": None, "video_processor": InternVLVideoProcessor(size=SQUARE), "tokenizer": tokenizer}
    return MEMBERS["internvl"].build(0), _processor(InternVLProcessor, image_seq_length=4, **parts)


def smolvlm() -> Made:
    ids = {"<image>": vision.IMAGE, "<fake_token_around_image>": vision.START, "<global-img>": GLOBAL}
    tokenizer = word_tokenizer(ids | {"<video>": vision.LINE}, image_token="<image>", video_token="<video>")
    videos = SmolVLMVideoProcessor(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE})
    with patch("transformers.models.smolvlm.processing_smolvlm.num2words", str):
        parts = {"image_processor": None, "video_processor": videos, "tokenizer": tokenizer}
        return MEMBERS["smolvlm"].build(0), _processor(SmolVLMProcessor, image_seq_len=4, **parts)


_OTHERS = (
    cohere_compass,
    gemma4,
    gemma4_unified,
    internvl,
    llava_next_video,
    llava_onevision,
    molmo2,
    muse_glimmer,
    perception_lm,
    smolvlm,
    video_llava,
)
FAMILIES: dict[str, Callable[[], Made]] = {
    "qwen2_vl": partial(_qwen, "qwen2_vl", Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": partial(_qwen, "qwen2_5_vl", Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": partial(_qwen, "qwen3_vl", Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "qwen3_vl_moe": partial(_qwen, "qwen3_vl_moe", Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "qwen3_5": partial(_qwen, "qwen3_5", Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "qwen3_5_moe": partial(_qwen, "qwen3_5_moe", Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "cosmos3_edge": partial(_qwen, "cosmos3_edge", Cosmos3EdgeProcessor, Cosmos3EdgeVideoProcessor),
    "cosmos3_omni": partial(_qwen, "cosmos3_omni", Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "exaone4_5": partial(_qwen, "exaone4_5", Exaone4_5_Processor, Qwen2VLVideoProcessor),
    "hyperclovax_vision_v2": partial(
        _qwen, "hyperclovax_vision_v2", HyperCLOVAXVisionV2Processor, Qwen2VLVideoProcessor
    ),
    "qwen2_5_omni_thinker": partial(_omni, "qwen2_5_omni_thinker", Qwen2_5OmniProcessor, Qwen2VLVideoProcessor),
    "qwen3_omni_moe_thinker": partial(_omni, "qwen3_omni_moe_thinker", Qwen3OmniMoeProcessor, Qwen2VLVideoProcessor),
    "lfm3_vl": partial(_qwen, "lfm3_vl", Lfm3VlProcessor, Qwen3VLVideoProcessor),
    "glm4v": partial(_glm, "glm4v", Glm4vProcessor, Glm4vVideoProcessor),
    "glm4v_moe": partial(_glm, "glm4v_moe", Glm4vProcessor, Glm4vVideoProcessor),
    "glm46v": partial(_glm, "glm46v", Glm46VProcessor, Glm46VVideoProcessor),
    "glmga": partial(_glm, "glmga", Glm46VProcessor, GlmgaVideoProcessor),
    "glm_ocr": partial(_glm, "glm_ocr", Glm46VProcessor, Glm46VVideoProcessor),
    **{made.__name__: made for made in _OTHERS},
}
#: They see the middle of a frame alone.
CENTRED = ("llava_next_video", "video_llava")
#: What the family's chat template writes around a video.
AROUND = {
    "qwen2_vl": ("<|vision_start|>", "<|vision_end|>"),
    "qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>"),
    "exaone4_5": ("<|vision_start|>", "<|vision_end|>"),
    "hyperclovax_vision_v2": ("<|vision_start|>", "<|vision_end|>"),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), ("<|bos|>", "<|eos|>")),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"), ("<|begin_of_video|>", "<|end_of_video|>")),
}

_SMALL = {"videos_kwargs": {"min_pixels": 1024, "max_pixels": 4096}}
#: What the family's processor must be told.
SETTINGS: dict[str, dict[str, Any]] = {
    "cosmos3_edge": {"return_mm_token_type_ids": True},  # its model wants what it does not return by itself
    "qwen2_5_omni_thinker": _SMALL,
    "qwen3_omni_moe_thinker": _SMALL,
}


@pytest.mark.parametrize("size", SIZES, ids=["square", "wide", "tall"])
@pytest.mark.parametrize("family", FAMILIES)
@patch("transformers.models.smolvlm.processing_smolvlm.num2words", str)
def test_the_lit_frame(family: str, size: tuple[int, int]) -> None:
    model, processor = FAMILIES[family]()
    dark = lit(size, DARK)
    nothing = _inputs(family, processor, [dark] * FRAMES)
    shown = 0
    for number, place in zip((0, 2, 3, 4), SPOTS, strict=True):
        frames = [lit(size, place) if frame == number else dark for frame in range(FRAMES)]
        inputs = _inputs(family, processor, frames)
        seen = place_pictures(model.config, processor, [], inputs, [frames])
        light = token_light(model, inputs, nothing)
        assert sum(one.view.tokens for one in seen) == len(light)
        shown += _covers(seen, int(light.argmax()), number, place, SLACK.get(family, 0.2))
    assert shown >= (1 if family in CENTRED else len(SPOTS))


def _covers(seen: list[PlacedView], token: int, frame: int, place: tuple[float, float], slack: float) -> bool:
    """Whether any view of this frame shows the place; if so it must hold the token, and its cell cover the place."""
    one = next(one for one in reversed(seen) if one.moment is not None and one.moment <= frame)
    view, picture = one.view, one.picture
    row = (place[1] * picture.height - view.box.top) / (view.box.height / view.rows)
    column = (place[0] * picture.width - view.box.left) / (view.box.width / view.columns)
    if not (0 < row < view.rows and 0 < column < view.columns):
        return False
    first = sum(other.view.tokens for other in seen[: seen.index(one)])
    cell = view.cell(token - first)
    assert cell is not None
    assert -slack <= row - cell[0] <= 1 + slack
    assert -slack <= column - cell[1] <= 1 + slack
    return True


def _inputs(family: str, processor: Any, frames: list[Image.Image]) -> Any:
    before, behind = AROUND.get(family, ("", ""))
    made = processor(
        text=[f"w5 {before}{processor.video_token}{behind} w7"],
        videos=[frames],
        video_metadata=[default_metadata(len(frames))],
        do_sample_frames=False,
        return_metadata=True,
        return_tensors="pt",
        **SETTINGS.get(family, {}),
    )
    return {name: made[name] for name in made if name != "video_metadata"}
