"""Pictures of the tokens that a prefill kept."""
