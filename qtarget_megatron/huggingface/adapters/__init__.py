"""Low-rank adapters (LoRA): which layers of a model have them, how Megatron's layers hold them, and PEFT's files."""
