"""Stands in for a Triton backend of a CPU, so that vLLM's second model runner, whose kernels Triton then interprets
(TRITON_INTERPRET=1), starts on a machine without a GPU. It compiles nothing."""
