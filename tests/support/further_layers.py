"""Layers that predict further tokens, as checkpoints of DeepSeek-V3 and GLM-4.5 hold them behind the last one: added to
models of transformers, which has none; and what they compute, in float64, from the checkpoint alone."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from checkpoint_models import edit_json
from safetensors.torch import load_file, save_file


def add_further(folder: Path, seed: int = 5) -> Path:
    """Give a model one such layer: random, but for its copies of embedding and head. All then lies in one file."""
    weights = _tensors(folder)
    generator = torch.Generator().manual_seed(seed)
    last = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    hidden = weights["model.norm.weight"].numel()
    dtype = weights["model.norm.weight"].dtype

    def drawn(like: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(like.shape, generator=generator)
        return (noise * 0.15 if like.dim() > 1 else 1 + noise * 0.1).to(like.dtype)

    own, before = f"model.layers.{last}.", f"model.layers.{last - 1}."
    further = {own + name.removeprefix(before): drawn(t) for name, t in weights.items() if name.startswith(before)}
    for name in ("enorm", "hnorm", "shared_head.norm"):
        further[f"{own}{name}.weight"] = drawn(torch.empty(hidden, dtype=dtype))
    further[f"{own}eh_proj.weight"] = drawn(torch.empty(hidden, 2 * hidden, dtype=dtype))
    further[f"{own}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    further[f"{own}shared_head.head.weight"] = weights["lm_head.weight"].clone()
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(weights | further, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", num_nextn_predict_layers=1)
    return folder


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def further_log_probabilities(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """log p of each token two places on, [s - 2], in float64.

    h'_i = M [RMSNorm(E(t_i+1)); RMSNorm(h_i)], then a layer of the model, a norm and the head, as public
    implementations of inference have it. h: the model's output, behind its last norm.
    """
    options = dict(dtype=torch.float64, experts_implementation="eager", attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    config = model.config
    weights = {name: t.double() for name, t in _tensors(folder).items()}
    own = f"model.layers.{config.num_hidden_layers}."

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weights[f"{own}{name}.weight"], config.rms_norm_eps)

    hidden = model.model(ids[None]).last_hidden_state[:, :-1]
    embedded = weights[f"{own}embed_tokens.weight"][ids[None, 1:]]
    x = torch.cat([norm("enorm", embedded), norm("hnorm", hidden)], -1) @ weights[f"{own}eh_proj.weight"].T
    kind = type(model.model.layers[-1])
    layer = kind(config, config.num_hidden_layers - 1).double().eval()
    layer.load_state_dict(_in_memory(weights, own, layer.state_dict().keys()))
    rotary = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    mask = torch.full((x.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)[None, None]
    x = layer(x, attention_mask=mask, position_ids=torch.arange(x.shape[1])[None], position_embeddings=rotary)
    x = x[0] if isinstance(x, tuple) else x
    logits = norm("shared_head.norm", x.view(1, -1, x.shape[-1]))[0] @ weights[f"{own}shared_head.head.weight"].T
    return logits.log_softmax(-1)[:-1].gather(-1, ids[2:, None])[:, 0]


def _in_memory(weights: dict[str, torch.Tensor], own: str, names) -> dict[str, torch.Tensor]:
    """A layer's tensors as transformers has them in memory, those of experts in one."""
    found = {}
    for name in names:
        stem, _, part = name.partition("mlp.experts.")
        if not part:
            found[name] = weights[own + name]
            continue
        roles = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[part]
        experts = 1 + max(
            int(key.split(".experts.")[1].split(".")[0]) for key in weights if key.startswith(f"{own}mlp.experts.")
        )
        found[name] = torch.stack(
            [torch.cat([weights[f"{own}mlp.experts.{e}.{role}.weight"] for role in roles]) for e in range(experts)]
        )
    return found
