"""PyramidDrop: make vision-language models cheaper by dropping visual tokens inside the language model, in stages."""
