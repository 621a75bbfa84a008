"""Run the command `pyramiddrop` with `python -m pyramiddrop`."""

from pyramiddrop.cli.main import main

if __name__ == "__main__":  # processes that a server spawns import this module
    main()
