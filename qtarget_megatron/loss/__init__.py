"""The losses: of given logits, and of hidden states whose logits are made a chunk at a time.

statistics -> one all-gather -> merge -> objective -> gradient; qtarget_megatron.statistics says what the first are.
"""
