"""Weights in Megatron's models and checkpoints: to and from safetensors, loaded, compared."""
