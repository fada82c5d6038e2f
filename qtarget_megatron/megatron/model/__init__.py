"""Megatron models of a Hugging Face architecture, with a frozen second model stacked on."""
