"""Quantised checkpoints made by tests, and what they stand for, written out number by number."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# Neither divides the sizes of the models of tools/first_hour/families.py, nor is divided by them.
BLOCK = (10, 7)
# What 0 to 15 stand for in mxfp4.
FLOAT4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
# What DeepSeek keeps in 16 bits.
KEPT = (
    "norm.weight",
    "mlp.gate.weight",
    "embed_tokens.weight",
    "lm_head.weight",
    "shared_head.head.weight",
    "e_score_correction_bias",
)


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


def pack_float4(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, scales) in mxfp4 of the matrices [E, I, J] of experts, each 32 numbers of a column with a scale."""
    numbers = tensor.float().mT.unflatten(2, (-1, 32))
    largest = numbers.abs().amax(-1, keepdim=True)
    exponents = (largest / 6).log2().ceil().clamp(-127, 127)
    table = torch.tensor(FLOAT4)
    codes = (numbers / exponents.exp2()).unsqueeze(-1).sub(table).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents.squeeze(-1) + 127).to(torch.uint8)


def unpack_float4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[E, I, J] in bfloat16, number by number."""
    experts, rows, count, _ = blocks.shape
    found = [[[0.0] * rows for _ in range(count * 32)] for _ in range(experts)]
    stored, exponents = blocks.tolist(), scales.tolist()
    for e, j, i in itertools.product(range(experts), range(rows), range(count * 32)):
        byte = stored[e][j][i // 32][i % 32 // 2]
        code = byte >> 4 if i % 2 else byte & 15
        found[e][i][j] = FLOAT4[code] * 2.0 ** (exponents[e][j][i // 32] - 127)
    return torch.tensor(found).bfloat16()


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


def write_mxfp4(source: Path, target: Path) -> dict:
    """source, a gpt-oss of bfloat16 in one file, with its experts quantised as published ones are. Returns the tensors
    that it stands for."""
    shutil.copytree(source, target)
    tensors, stood_for = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = pack_float4(tensor)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            stood_for[name] = unpack_float4(blocks, scales)
        else:
            stood_for[name] = tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    path = target / "config.json"
    described = dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(quantization_config=described)))
    return stood_for


def stands_for(directory: Path, tensors: dict) -> Path:
    """The unquantised directory beside a quantised one, of these tensors."""
    plain = directory.with_name(f"{directory.name}-stands-for")
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return plain
