"""Training with dropped tokens: conversations with images, masked to their answers, in the trainer that people use."""
