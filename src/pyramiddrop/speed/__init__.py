"""Measured speed: models and methods side by side, on this machine's clock and in its memory."""
