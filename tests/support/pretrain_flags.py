"""Flags of a small model that Megatron trains by itself."""

STEPS = 4
FLAGS = [
    *("--num-layers", 4, "--hidden-size", 64, "--num-attention-heads", 4, "--seq-length", 32),
    *("--max-position-embeddings", 32, "--micro-batch-size", 2, "--global-batch-size", 16, "--lr", 1e-3),
    *("--transformer-impl", "local", "--tokenizer-type", "NullTokenizer", "--vocab-size", 255),
    *("--eval-iters", 0, "--eval-interval", 9, "--save-interval", 9, "--num-workers", 0),
    *("--position-embedding-type", "rope", "--no-rope-fusion", "--no-persist-layer-norm"),
    *("--no-gradient-accumulation-fusion", "--adam-eps", 1e-5),  # see noise_floor.py
    *("--hidden-dropout", 0, "--attention-dropout", 0),
    *("--train-iters", STEPS, "--log-interval", 1),
]
