"""Model classes: vLLM's own, with the layers of their text model divided into stages."""

from __future__ import annotations

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
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from pyramiddrop.vllm.attention import join_stage
from pyramiddrop.vllm.batch import Batch
from pyramiddrop.vllm.forward import StagedForward
from pyramiddrop.vllm.rules import rules_of
from pyramiddrop.vllm.runner import describe_steps
from pyramiddrop.vllm.soundness import refuse_unsound

#: Decoder layers that `ranking.project` and `forward.StagedForward` know how to call.
LAYERS = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)


class _Staged:
    """Over one of vLLM's vision-language models.

    Attributes:
        pyramiddrop_rules: of the engine.
        pyramiddrop_batch: the step that runs.
    """

    language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_unsound(vllm_config)  # once more: after it asked, vLLM goes on to set what was left open
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.pyramiddrop_rules = rules_of(vllm_config)
        self.pyramiddrop_batch = Batch()
        for index, layer in enumerate(self.language_model.model.layers):
            if not isinstance(layer, LAYERS):
                raise ValueError(f"pyramiddrop cannot serve a text model of {type(layer).__name__}")
            stage = self.pyramiddrop_rules.schedule.stage_of(index)
            join_stage(layer.self_attn.attn, stage, self.pyramiddrop_batch)
        describe_steps()

    @classmethod
    def get_model_state_cls(cls) -> Any:
        """vLLM's second model runner asks the model what keeps its state."""
        from pyramiddrop.vllm.model_state import StagedModelState

        return StagedModelState

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """vLLM's own forward, compiled and all, but where the step computes a part of a visual prompt."""
        step = self.pyramiddrop_batch.step
        if step is None or not step.visits or not _attends():
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]
        assert inputs_embeds is not None, "a step with a picture is fed with embeddings"
        self.pyramiddrop_batch.step = None  # done once; what vLLM runs of its own accord is none of the engine's steps
        staged = StagedForward(self.pyramiddrop_rules, self.pyramiddrop_batch, step, inputs_embeds.device)
        deepstack = self._deepstack(len(inputs_embeds))
        return staged.run(self.language_model.model, positions, inputs_embeds, deepstack)

    def _deepstack(self, tokens: int) -> Mapping[int, Tensor]:
        """Layer -> (T, D), what the model adds to the rows after it."""
        return {}


def _attends() -> bool:
    """Whether this is a step with a KV cache; profiling runs have none."""
    return is_forward_context_available() and get_forward_context().attn_metadata is not None


class PyramidDropLlavaForConditionalGeneration(_Staged, LlavaForConditionalGeneration):
    """LLaVA-1.5."""


class PyramidDropLlavaNextForConditionalGeneration(_Staged, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""


class PyramidDropQwen2VLForConditionalGeneration(_Staged, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


class PyramidDropQwen2_5_VLForConditionalGeneration(_Staged, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class PyramidDropQwen3VLForConditionalGeneration(_Staged, Qwen3VLForConditionalGeneration):
    """Qwen3-VL, whose first layers are given visual features once more."""

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


class PyramidDropInternVLForConditionalGeneration(_Staged, InternS1ForConditionalGeneration):
    """InternVL in Transformers' format, which vLLM serves by its class of Intern-S1."""


class PyramidDropInternVLChatModel(_Staged, InternVLChatModel):
    """InternVL in its authors' format."""
