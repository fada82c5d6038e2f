"""What a verification trains: random weights for a small config.json, a tokenizer, and samples of token ids.

All of it follows from a seed, so that every rank can write its own.

Experts are chosen with a margin. A token whose scores are all but equal goes to another expert where a last bit is
rounded otherwise, and its whole gradient goes with it: no bound would hold. So the first E numbers of the hidden
states, one for each expert, are the embedding's alone (what layers add there is 0), and a router reads little else.
What is drawn for a token there is drawn again until the choice is clear.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qtarget_megatron.data import IGNORE_INDEX
from qtarget_megatron.huggingface import CORRECTION, Architecture, Experts, Lora, hf_tensor_shapes, tensor_dtype
from qtarget_megatron.huggingface.adapters.peft_directory import CONFIG, config_bytes, planned_tensors, write_weights
from qtarget_megatron.huggingface.config import families

# Rows of the embedding, of which each tensor-parallel size pads another number; the tokenizer has fewer tokens.
VOCAB_SIZE, _TOKENS = 307, 301
_EMBEDDING, _OUTWARD, _HEAD, _NORM = 0.2, 0.2, 2.0, 0.1
# Scores of a token's experts are that far apart in units of the router's logits, and a router adds that to them.
_LEVEL, _ROUTER, _ROUTER_NOISE, _CORRECTION = 1.5, 1.5, 0.002, 0.005
# Hidden states may be larger or smaller by the time that they reach a router.
_SCALES, _MARGIN = (0.4, 0.6, 0.8, 1.0, 1.3), 0.02


def write_small_model(
    folder: Path, config: Mapping[str, Any], seed: int, order: Tensor | None = None
) -> dict[str, Tensor]:
    """A Hugging Face directory with config.json, weights and tokenizer; the weights by name.

    order: a permutation of the hidden dimension, see reordered(): the same function, added up in another order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1) + "\n", encoding="utf-8")
    tensors = _weights(Architecture.from_config(config), seed)
    if order is not None:
        tensors = reordered(tensors, order)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    return tensors


def write_small_adapters(
    folder: Path, arch: Architecture, lora: Lora, seed: int, order: Tensor | None = None
) -> dict[str, Tensor]:
    """A PEFT directory for write_small_model()'s model; its tensors by name. Both factors are random: with the zeros
    that a training begins with, one of them would have no gradient. order: as there."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    planned, experts = planned_tensors(arch, lora, torch.float32), 0 if arch.experts is None else arch.experts.count
    tensors = {}
    for name, tensor in planned.items():
        values = torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
        if ".lora_B." in name:
            # What an adapter adds is half of what its layer gives, whatever s is.
            values *= 0.5 / lora.scale
        if tensor.shape[0] == arch.hidden_size:
            # As of layers, so that experts keep their margin.
            values = _OUTWARD * values
            values[:experts] = 0.0
        tensors[name] = values
    if order is not None:
        tensors = reordered(tensors, order)
    write_weights(folder, planned, tensors.items())
    (folder / CONFIG).write_bytes(config_bytes(arch, lora, "a small model"))
    return tensors


def reordered(tensors: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """The tensors with their hidden dimensions permuted: those that are as large as order, see shrunk_config()."""
    found = {}
    for name, tensor in tensors.items():
        for dim, size in enumerate(tensor.shape):
            if size == len(order):
                tensor = tensor.index_select(dim, order)
        found[name] = tensor.contiguous()
    return found


def _weights(arch: Architecture, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    family, hidden = families.by_name(arch.family), arch.hidden_size
    embedding, head = family.tensor("embedding"), family.tensor("head")
    routers = {family.tensor("router", layer=layer) for layer in range(arch.num_layers)}
    experts = 0 if arch.experts is None else arch.experts.count
    if experts >= hidden:
        raise ValueError(f"a small model of {experts} experts needs more than {hidden} hidden dimensions")
    tensors = {}
    for name, shape in hf_tensor_shapes(arch).items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith(CORRECTION):
            tensor *= _CORRECTION
        elif len(shape) == 1 and name.endswith(".bias"):
            tensor *= _NORM
        elif len(shape) == 1:
            tensor = 1 + _NORM * tensor
        elif name in routers:
            tensor *= _ROUTER_NOISE
            tensor[:, :experts] += _ROUTER * torch.eye(experts)
        elif name in (embedding, head):
            tensor *= _EMBEDDING if name == embedding else _HEAD / hidden**0.5
        else:
            tensor *= (_OUTWARD if shape[0] == hidden else 1.0) / shape[-1] ** 0.5
        if name == embedding and arch.experts is not None:
            tensor[:, :experts] = _EMBEDDING * _levels(arch.experts, len(tensor), generator)
        elif shape[0] == hidden:
            # Norms leave the scores of experts as they are, layers add nothing to them.
            tensor[:experts] = 1.0 if len(shape) == 1 and not name.endswith(".bias") else 0.0
        tensors[name] = tensor.to(tensor_dtype(name, arch.dtype))
    return tensors


def _levels(experts: Experts, count: int, generator: torch.Generator) -> Tensor:
    """[count, E], scores of each token's experts that leave no doubt which are chosen."""
    levels = torch.linspace(-_LEVEL, _LEVEL, experts.count)
    rows: list[Tensor] = []
    for _ in range(1000 * count):
        row = levels[torch.randperm(experts.count, generator=generator)]
        if experts.groups is None or all(_is_clear(row * scale, experts) for scale in _SCALES):
            rows.append(row)
        if len(rows) == count:
            return torch.stack(rows)
    raise ValueError(f"expected experts that can be chosen with a margin, got {experts.count} in {experts.groups}")


def _is_clear(logits: Tensor, experts: Experts) -> bool:
    """Whether the groups of experts that are chosen stand out from the others."""
    assert experts.groups is not None
    scores = logits.sigmoid() if experts.score == "sigmoid" else logits.softmax(0)
    best = scores.view(experts.groups.count, -1).topk(2, dim=-1).values.sum(-1).sort(descending=True).values
    return bool(best[experts.groups.top - 1] - best[experts.groups.top] > _MARGIN)


def _write_tokenizer(folder: Path) -> None:
    # Imported late: seconds.
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"token{index}" for index in range(3, _TOKENS))]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def write_samples(path: Path, count: int, *, row_length: int, unit: int, inputs: Sequence[str], seed: int) -> None:
    """JSON lines of token ids with labels and side inputs.

    row_length: samples have an eighth to a half of it.
    unit:       that their lengths are multiples of.
    inputs:     names of the side inputs.

    Every second sample is trained on as a whole, the others on a token or two, and every ninth on none: ranks and
    micro-batches have very different numbers of targets, and whoever divides by its own number is far off.
    """
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            tokens = max(draw.randint(row_length // 8, row_length // 2) // unit, 1) * unit
            # The last id is a target alone.
            ids = [draw.randrange(3, _TOKENS) for _ in range(tokens + 1)]
            share = 0.0 if index % 9 == 8 else 0.9 if index % 2 else 0.1
            targets = [place > 0 and draw.random() < share for place in range(tokens + 1)]
            targets[-1] = share > 0
            labels = [token if target else IGNORE_INDEX for token, target in zip(ids, targets, strict=True)]
            record: dict[str, Any] = {"input_ids": ids, "labels": labels}
            record |= {name: [_side_input(name, draw) for _ in range(sum(targets))] for name in inputs}
            file.write(json.dumps(record) + "\n")


def _side_input(name: str, draw: random.Random) -> float:
    """A number that makes a difference under the published objectives; of another name one in [0, 1)."""
    uniform = draw.random()
    # Tokens have log-probabilities near -7.7: ratios on both sides of a clip.
    known = {"weight": 0.2 + 2 * uniform, "critical": float(uniform < 0.6), "old_log_prob": -9 + 3 * uniform}
    return known.get(name, uniform)
