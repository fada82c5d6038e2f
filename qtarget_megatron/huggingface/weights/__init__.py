"""Tensors in safetensors files: read, written, named."""
