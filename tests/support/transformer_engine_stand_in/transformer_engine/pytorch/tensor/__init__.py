class QuantizedTensor:
    """What Megatron asks parameters whether they are; none is."""
