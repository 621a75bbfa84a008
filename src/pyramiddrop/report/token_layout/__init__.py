"""Token layout: the part of the picture that each visual token is made from, by model family."""
