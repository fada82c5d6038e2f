"""A study of two trainings of three steps, for tests."""

from __future__ import annotations

from pathlib import Path

TINY = """
title = "Tiny"
steps = 3
learning_rates = [1e-3]
demonstrations = 16
workers = 2

[flags]
cpu = true
seq-length = 64
no-pack = true
micro-batch-size = 8
global-batch-size = 8

[bases.tiny]
config = { hidden_size = 32, intermediate_size = 48, num_hidden_layers = 1, num_attention_heads = 2 }
steps = 3

[data.clean]
task = "table"
dev = 20
test = 60
expected = { greedy = "tie" }

[arms.sft]
objective = "sft"

[arms."target-sft 0.5"]
objective = "target-sft"
args = ["eta=0.5"]

[[grids]]
name = "main"
data = ["clean"]
bases = ["tiny"]
arms = ["sft", "target-sft 0.5"]
seeds = 1
"""


def written(path: Path, text: str = TINY, **changes: str) -> Path:
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path
