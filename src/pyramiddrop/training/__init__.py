"""Train with dropped tokens on conversations with images, supervised on their answers."""
