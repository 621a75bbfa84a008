"""The paper's studies on any model and data: where visual tokens are redundant, what methods cost, what λ does."""
