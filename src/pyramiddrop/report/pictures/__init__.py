"""Pictures of what a prefill kept."""
