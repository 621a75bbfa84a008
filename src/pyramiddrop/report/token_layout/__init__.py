"""Token layout: the part of the picture that each visual token stands for, by model family."""
