"""A model's logits and hidden states beside those of transformers."""
