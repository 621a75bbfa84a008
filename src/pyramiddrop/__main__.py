"""Lets `python -m pyramiddrop` be the command `pyramiddrop`."""

from pyramiddrop.cli.main import main

if __name__ == "__main__":  # the processes that a server spawns import this module
    main()
