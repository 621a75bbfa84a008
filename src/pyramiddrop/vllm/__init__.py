"""The vLLM plugin: drop visual tokens inside a served language model, with separate KV blocks for each stage.

vLLM finds `register` by the entry point `vllm.general_plugins`. An engine drops tokens if its architecture is one of
those registered here; `hf_overrides` selects it, so that a missing plugin is an error instead of a model that drops
nothing:

>>> from vllm import LLM
>>> from pyramiddrop import PyramidDrop
>>> from pyramiddrop.vllm import hf_overrides
>>> llm = LLM("llava-hf/llava-1.5-7b-hf", hf_overrides=hf_overrides("llava-hf/llava-1.5-7b-hf", PyramidDrop(lam=0.5)))
"""

from pyramiddrop.vllm.registration import hf_overrides as hf_overrides
from pyramiddrop.vllm.registration import register as register
