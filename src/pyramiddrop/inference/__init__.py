"""A checkpoint, a picture and a question in; an answer, what it cost and what was kept out."""
