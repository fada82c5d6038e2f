"""Trainings with adapters for tests: random PEFT directories to start from, and the same by peft on transformers."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import torch
from finetune_runs import COMMON
from megatron_reset import reset
from safetensors.torch import load_file

from qtarget_megatron.data import encode, load_tokenizer
from qtarget_megatron.huggingface import Architecture, Lora, adapted_modules
from qtarget_megatron.huggingface.adapters import peft_directory as peft

DENSE = ("q", "k", "v", "o", "gate", "up", "down")
# Model of finetune_runs.write_models -> targets.
TARGETS = {
    "untied": DENSE,
    "tied": ("q", "v", "gate", "down"),
    "experts": ("q", "o", "experts"),
    "weighted": ("q", "k", "v", "o", "gate", "up", "down"),
    "latent": ("q", "k", "v", "o", "experts"),
    "sinks": ("q", "k", "v", "o"),
}


def write_adapters(folder: Path, model: Path, lora: Lora, seed: int = 5, scale: float = 0.2) -> Path:
    """A PEFT directory of random numbers, so that both factors have gradients from the first step on."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    planned = peft.planned_tensors(arch := Architecture.from_hf(model), lora, torch.float32)
    tensors = {name: torch.randn(tensor.shape, generator=generator) * scale for name, tensor in planned.items()}
    peft.write_weights(folder, planned, tensors.items())
    (folder / peft.CONFIG).write_bytes(peft.config_bytes(arch, lora, str(model)))
    return folder


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / peft.WEIGHTS)


def trained_words(lora: Lora) -> list:
    """The flags of adapters, as to resume them."""
    return ["--lora-rank", lora.rank, "--lora-alpha", lora.alpha, "--lora-targets", *lora.targets]


def record_all(runs: dict[str, list]) -> dict[str, dict]:
    """Fine-tune once for each entry, in this process group; called on every rank (by launching.run_ranks).

    Returns for each run its losses (sum, number of tokens), its gradients by name, and whether the weights beside the
    adapters are still those of --hf-model, bit for bit; and the parameters that DDP and the optimizer know.
    """
    from qtarget_megatron import finetune
    from qtarget_megatron.megatron.verify.recording import Recording

    found = {}
    for name, words in runs.items():
        recording, printed = Recording(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                finetune.fine_tune([str(word) for word in (*COMMON, *words)], recording)
            except BaseException as error:
                error.add_note(f"in {name}; printed:\n{printed.getvalue()[-3000:]}")
                raise
        found[name] = {
            "losses": recording.losses,
            # As arrays: they outlive the process.
            "gradients": [{key: tensor.numpy() for key, tensor in of_step} for of_step in recording.gradients],
            "frozen": _is_frozen(recording),
            "trained": _trained(recording),
        }
        reset()
    return found


def _is_frozen(recording) -> bool:
    from qtarget_megatron.huggingface import HFReader
    from qtarget_megatron.megatron.weights.hf_weights import load_hf_weights, weights

    arch, reader = recording._arch, HFReader(recording._args.hf_model)
    for model in recording._models:
        trained = {name: tensor.detach().clone() for name, tensor in weights(model, arch)}
        for _, tensor in weights(model, arch):
            tensor.detach().zero_()
        load_hf_weights(model, reader, arch)
        if not all(torch.equal(trained[name], tensor) for name, tensor in weights(model, arch)):
            return False
    return True


def _trained(recording) -> set[str]:
    """Names of the parameters that have a place among the gradients, and of those that the optimizer steps."""
    from qtarget_megatron.megatron.weights.fingerprint import optimizer_states

    names = {id(parameter): name for model in recording._models for name, parameter in model.named_parameters()}
    stepped = {names[id(parameter)] for parameter, *_ in optimizer_states(recording._optimizer)}
    return stepped | {
        name
        for model in recording._models
        for name, parameter in model.named_parameters()
        if getattr(parameter, "main_grad", None) is not None or parameter.requires_grad
    }


def by_peft(model: Path, adapters: Path, data: Path, seq_length: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss of a supervised token over all records in one batch, and the gradients of the adapters, by name."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(_loaded(model, torch.float32), adapters, is_trainable=True).eval()
    loss = _mean_loss(adapted, model, data, seq_length)
    loss.backward()
    named = adapted.named_parameters()
    return loss.item(), {name.replace(".default.", "."): p.grad for name, p in named if p.grad is not None}


def by_chain_rule(model: Path, adapters: Path, data: Path, seq_length: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The same in float64 from transformers' model with W + s B A in the place of W: dA = s B^T dW, dB = s dW A^T.

    It needs nothing that knows adapters, and serves experts, which transformers has in one tensor.
    """
    arch, given = Architecture.from_hf(model), {name: tensor.double() for name, tensor in factors(adapters).items()}
    lora, merged = peft.PeftDirectory(adapters, arch).lora, _loaded(model, torch.float64).eval()
    pairs = {}
    for module in adapted_modules(arch, lora):
        first, second = (given[peft.tensor_name(module, factor)] for factor in "AB")
        pairs[module] = first, second
        with torch.no_grad():
            _weight(merged, module, arch).add_(lora.scale * second @ first)
    loss = _mean_loss(merged, model, data, seq_length)
    loss.backward()
    gradients = {}
    for module, (first, second) in pairs.items():
        of_weight = lora.scale * _weight(merged, module, arch, of_gradient=True)
        gradients[peft.tensor_name(module, "A")] = second.t() @ of_weight
        gradients[peft.tensor_name(module, "B")] = of_weight @ first.t()
    return loss.item(), gradients


def _weight(model, module: str, arch: Architecture, *, of_gradient: bool = False) -> torch.Tensor:
    """The weight of a Hugging Face module, or its gradient, where it lies in transformers' model."""
    layer, in_experts, rest = re.sub(r"\.block_sparse_moe\.", ".mlp.", module).partition(".mlp.experts.")
    if not in_experts:
        found, place = model.get_parameter(f"{module}.weight"), slice(None)
    else:
        # transformers has all experts of a layer in one tensor, gate and up as well.
        expert, projection = rest.split(".")
        width = arch.experts.ffn_hidden_size
        halves = {"gate_proj": slice(0, width), "up_proj": slice(width, None)}
        halves |= {"w1": halves["gate_proj"], "w3": halves["up_proj"]}
        name = "gate_up_proj" if projection in halves else "down_proj"
        found, place = (
            model.get_parameter(f"{layer}.mlp.experts.{name}"),
            (int(expert), halves.get(projection, slice(None))),
        )
    return (found.grad if of_gradient else found)[place]


def _loaded(model: Path, dtype: torch.dtype):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, experts_implementation="eager")


def _mean_loss(model, folder: Path, data: Path, seq_length: int) -> torch.Tensor:
    tokenizer, total, count = load_tokenizer(folder), torch.zeros((), dtype=torch.float64), 0
    for line in data.read_text().splitlines():
        sample = encode(tokenizer, json.loads(line), seq_length=seq_length)
        tokens, supervised = torch.as_tensor(sample.input_ids), torch.as_tensor(sample.supervised)
        labels = tokens[1:].masked_fill(~supervised[1:], -100)
        logits = model(tokens[None, :-1]).logits[0].double()
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int(supervised.sum())
    return total / count
