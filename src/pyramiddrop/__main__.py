"""Lets `python -m pyramiddrop` be the command `pyramiddrop`."""

from pyramiddrop.cli.main import main

main()
