"""Load a checkpoint, ask it about pictures under a method, and report the answer and its cost."""
