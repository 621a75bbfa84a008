"""Tables for the terminal and for documents."""
