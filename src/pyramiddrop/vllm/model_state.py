"""Hook into vLLM's second model runner (for GPUs) through its model state."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from pyramiddrop.vllm.batch import Batch
from pyramiddrop.vllm.prompts import VisualPrompt, read_prompt
from pyramiddrop.vllm.rules import Rules, rules_for


class StagedModelState(DefaultModelState):
    """vLLM's model state with the visual prompt of every request of the worker."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._rules: Rules = self.model.pyramiddrop_rules
        self._batch: Batch = self.model.pyramiddrop_batch
        self._prompts: dict[str, VisualPrompt | None] = {}

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self._prompts[new_req_data.req_id] = read_prompt(
            new_req_data.mm_features,
            len(new_req_data.prompt_token_ids),
            rules_for(self._rules, new_req_data.sampling_params),
        )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._prompts.pop(req_id, None)
        self._batch.forget(req_id)

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **options: Any) -> dict[str, Any]:
        if all(request in self._prompts for request in input_batch.req_ids):
            count = len(input_batch.req_ids)
            self._batch.begin(
                input_batch.req_ids,
                [self._prompts[request] for request in input_batch.req_ids],
                input_batch.num_computed_tokens_np[:count],
                input_batch.num_scheduled_tokens[:count],
            )
        else:  # vLLM's own batch for warm-up or capture
            self._batch.step = None
        metadata: dict[str, Any] = super().prepare_attn(input_batch, *args, **options)
        return metadata
