"""Plug-ins for other trainers, which import each file by its path."""
