"""Plug-ins for other trainers, each a file that the trainer imports by its path."""
