"""The paper's studies on any model and data: redundancy of visual tokens, trade-off of methods, ablation of λ."""
