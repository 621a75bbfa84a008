"""Which part of the picture each visual token is made from: one module for each kind of family."""
