"""transformers: the tokenizers and generators of pictures that it has."""
