"""Quantised checkpoints made by tests, and what they stand for, written out number by number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# Neither divides the sizes of the models of tools/first_hour/families.py, nor is divided by them.
BLOCK = (10, 7)
# What DeepSeek keeps in 16 bits.
KEPT = ("norm.weight", "mlp.gate.weight", "embed_tokens.weight", "lm_head.weight", "e_score_correction_bias")


def quantize_blocks(tensor: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(values in float8_e4m3fn, a float32 scale for each block)."""
    (rows, columns), (height, width) = tensor.shape, block
    padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width)
    padded[:rows, :columns] = tensor.float()
    scales = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).abs().amax((1, 3)) / 448
    factors = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return (tensor.float() / factors).to(torch.float8_e4m3fn), scales


def dequantize_blocks(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Each number by itself: both factors are exact in float64, where a product has one rounding to float32."""
    found = torch.empty(values.shape, dtype=torch.float64)
    numbers, factors = values.double().tolist(), scales.double().tolist()
    for i, row in enumerate(numbers):
        found[i] = torch.tensor([x * factors[i // block[0]][j // block[1]] for j, x in enumerate(row)])
    return found.float().bfloat16()


def write_fp8(source: Path, target: Path, block: tuple[int, int] = BLOCK, scales=torch.float32, **config) -> dict:
    """source, a directory of bfloat16, with its matrices quantised as DeepSeek publishes them, and with config's
    entries besides. Returns the tensors that it stands for."""
    shutil.copytree(source, target)
    stood_for = {}
    for file in sorted(target.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(file).items():
            if name.endswith(KEPT) or tensor.dim() != 2:
                stood_for[name] = tensors[name] = tensor
                continue
            values, factors = quantize_blocks(tensor, block)
            tensors[name], tensors[f"{name}_scale_inv"] = values, factors.to(scales)
            stood_for[name] = dequantize_blocks(values, factors.to(scales), block)
        save_file(tensors, file, metadata={"format": "pt"})
    described = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=list(block))
    changes = dict(quantization_config=described, **config)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    index = target / "model.safetensors.index.json"
    if index.is_file():
        files = {name: file.name for file in target.glob("*.safetensors") for name in load_file(file)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return stood_for
