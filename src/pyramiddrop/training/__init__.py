"""Train with dropped tokens on conversations with images, supervised on their answers.

Which tokens are the query tokens of a training forward is decided by the adapter: see `pyramiddrop.hf.prompt_masks`.
"""
