"""Subclasses of vLLM's models, with the layers of the text model divided into stages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.internvl import InternVLChatModel
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.qwen3_moe import Qwen3MoeDecoderLayer
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper

from pyramiddrop.vllm.attention import join_stage, pad_heads
from pyramiddrop.vllm.batch import Batch
from pyramiddrop.vllm.contract import SECOND_RUNNER, check_contract
from pyramiddrop.vllm.forward import StagedForward
from pyramiddrop.vllm.prefix_rows import PrefixRows
from pyramiddrop.vllm.rules import rules_of
from pyramiddrop.vllm.runner import describe_steps
from pyramiddrop.vllm.unsupported import refuse_unsupported

#: Decoder layers that `ranking.project` and `forward.StagedForward` can call.
LAYERS = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer, Qwen3MoeDecoderLayer)


class _Staged:
    """Mixin for vLLM's vision-language models.

    Attributes:
        pyramiddrop_rules: the rules of the engine.
        pyramiddrop_batch: the description of the running step.
    """

    language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_unsupported(vllm_config)  # again, because vLLM sets further options after the first check
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.pyramiddrop_rules = rules_of(vllm_config)
        caching = vllm_config.cache_config.enable_prefix_caching
        ranks_before = self.pyramiddrop_rules.rank_layer == "last"
        self.pyramiddrop_batch = Batch(PrefixRows(vllm_config, ranks_before) if caching else None)
        for index, layer in enumerate(self.language_model.model.layers):
            if not isinstance(layer, LAYERS):
                raise ValueError(f"pyramiddrop cannot serve a text model of {type(layer).__name__}")
            stage = self.pyramiddrop_rules.schedule.stage_of(index)
            pad_heads(layer.self_attn.attn)
            join_stage(layer.self_attn.attn, stage, self.pyramiddrop_batch)
        self._pyramiddrop_pictures = False
        describe_steps()

    @classmethod
    def get_model_state_cls(cls) -> Any:
        """The class of the model state, for which vLLM's second model runner asks."""
        from pyramiddrop.vllm.model_state import StagedModelState

        check_contract(SECOND_RUNNER)
        return StagedModelState

    def embed_input_ids(self, input_ids: Tensor, multimodal_embeddings: Any = None, **options: Any) -> Tensor:
        """Embed as vLLM does, and note whether the step has a picture."""
        self._pyramiddrop_pictures = multimodal_embeddings is not None and len(multimodal_embeddings) > 0
        embeds: Tensor = super().embed_input_ids(input_ids, multimodal_embeddings, **options)  # type: ignore[misc]
        return embeds

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run vLLM's own (compiled) forward, except for steps that compute a part of a visual prompt.

        Raises:
            RuntimeError: for a step with a picture but without a description, in which nothing would be dropped.
        """
        step = self.pyramiddrop_batch.step
        pictures, self._pyramiddrop_pictures = self._pyramiddrop_pictures, False
        if pictures and step is None and _attends():
            raise RuntimeError(
                "pyramiddrop: a step with a picture reached the layers without a description: a hook into vLLM's model "
                "runner is lost"
            )
        if step is None or not step.has_visual or not _attends():
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]
        assert inputs_embeds is not None, "a step with a picture is fed with embeddings"
        self.pyramiddrop_batch.step = None  # used once, because vLLM's own runs are not steps of the engine
        lora_manager = getattr(self, "lora_manager", None)  # which vLLM sets if adapters may be served
        staged = StagedForward(self.pyramiddrop_rules, self.pyramiddrop_batch, step, lora_manager, inputs_embeds.device)
        deepstack = self._deepstack(len(inputs_embeds))
        return staged.run(self.language_model.model, positions, inputs_embeds, deepstack)

    def _deepstack(self, tokens: int) -> Mapping[int, Tensor]:
        """Layer -> (T, D) features that the model adds after it."""
        return {}


def _attends() -> bool:
    """True for steps with a KV cache; profiling runs have none."""
    return is_forward_context_available() and get_forward_context().attn_metadata is not None


#: Transformers 5 saves the parts of CLIP and SigLIP without the prefix `vision_model`. Pixtral has other parts.
_TOWER_NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^((?:model\.)?vision_tower\.)(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"): (
            r"\1vision_model."
        )
    }
)


class PyramidDropLlavaForConditionalGeneration(_Staged, LlavaForConditionalGeneration):
    """LLaVA-1.5."""

    hf_to_vllm_mapper = _TOWER_NAMES | LlavaForConditionalGeneration.hf_to_vllm_mapper


class PyramidDropLlavaNextForConditionalGeneration(_Staged, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""

    hf_to_vllm_mapper = _TOWER_NAMES | LlavaNextForConditionalGeneration.hf_to_vllm_mapper


class PyramidDropQwen2VLForConditionalGeneration(_Staged, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


class PyramidDropQwen2_5_VLForConditionalGeneration(_Staged, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class _Deepstack(_Staged):
    """Mixin for Qwen3-VL, whose first layers add visual features again."""

    deepstack_num_level: int
    _get_deepstack_input_embeds: Any
    _clear_deepstack_input_embeds: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        first = self.pyramiddrop_rules.schedule.layers[0]
        if first < self.deepstack_num_level:
            raise ValueError(
                f"Qwen3-VL adds visual features after its first {self.deepstack_num_level} layers; nothing can be "
                f"dropped before layer {first}"
            )

    def _deepstack(self, tokens: int) -> Mapping[int, Tensor]:
        held = self._get_deepstack_input_embeds(tokens)
        if held is None:
            return {}
        levels = {level: held[f"deepstack_input_embeds_{level}"].clone() for level in range(self.deepstack_num_level)}
        self._clear_deepstack_input_embeds(tokens)
        return levels


class PyramidDropQwen3VLForConditionalGeneration(_Deepstack, Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""


class PyramidDropQwen3VLMoeForConditionalGeneration(_Deepstack, Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL on a mixture of experts."""


class PyramidDropInternVLForConditionalGeneration(_Staged, InternS1ForConditionalGeneration):
    """InternVL in Transformers' format, which vLLM serves by its class of Intern-S1."""


class PyramidDropInternVLChatModel(_Staged, InternVLChatModel):
    """InternVL in its authors' format."""
