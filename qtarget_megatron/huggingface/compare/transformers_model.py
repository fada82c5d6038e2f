"""What transformers computes from a Hugging Face directory, without running any code of that directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtarget_megatron.huggingface.compare.hidden_states import Place, recorded
from qtarget_megatron.huggingface.config.config_file import read_config
from qtarget_megatron.huggingface.config.quantization import QUANTIZATION_KEYS, read_quantization
from qtarget_megatron.huggingface.weights.reader import HFReader


@torch.no_grad()
def transformers_logits(directory: Path, tokens: list[int], states: dict[Place, Tensor] | None = None) -> Tensor:
    """Logits of one sequence by transformers, float32 [s, vocab_size], on the CPU.

    states: is filled with what the parts of the decoder return, [s, hidden size]; of a decoder whose parts have other
    names than the common ones, with what it has.

    ValueError where transformers cannot load the directory, or a token is outside of the model's vocabulary.
    """
    model = load_transformers_model(directory)
    if max(tokens) >= model.config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer wrote id {max(tokens)}, the model has a vocabulary of "
            f"{model.config.vocab_size}: config.json and tokenizer do not belong together"
        )
    with recorded({} if states is None else _places(model.base_model)) as found:
        logits = model.eval()(torch.tensor([tokens], device="cpu")).logits[0].float()
    if states is not None:
        states |= {place: value[0].float() for place, value in found.items()}
    return logits


def load_transformers_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a Hugging Face directory, by transformers. ValueError where transformers cannot load it."""
    # Imported late: seconds, which only those spend who need a model of transformers.
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        config = read_config(directory)
        own = _own_class(config)
        options: dict[str, Any] = {}
        if own is not None:
            options["config"] = own.config_class.from_dict(_plain(config) | {"model_type": own.config_class.model_type})
        is_quantised = own is not None and read_quantization(config) is not None
        if is_quantised:
            # transformers dequantises to another dtype, and only matrices that whole blocks make up.
            with HFReader(directory) as reader:
                options["state_dict"] = {name: reader.read(name) for name in reader.names}
        model, report = (own or transformers.AutoModelForCausalLM).from_pretrained(
            None if is_quantised else str(directory),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        if report["missing_keys"]:
            # Left to themselves they are random numbers.
            raise ValueError(f"it finds no {min(report['missing_keys'])}")
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers cannot load a model from {directory}: {reason}") from error
    return model


def _own_class(config: Mapping[str, Any]) -> Any:
    """transformers' class that the config names, None where there is none. One that calls itself something else besides
    (model_type), as Kimi-K2 does, is not found otherwise."""
    import transformers

    found = config.get("architectures")
    name = found[0] if isinstance(found, list) and len(found) == 1 else None
    return getattr(transformers, name, None) if isinstance(name, str) and name.endswith("ForCausalLM") else None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}


def _places(decoder: torch.nn.Module) -> dict[Place, torch.nn.Module]:
    layers = getattr(decoder, "layers", ())
    places = {
        Place.embedding(): getattr(decoder, "embed_tokens", None),
        Place.final_norm(len(layers)): getattr(decoder, "norm", None),
    }
    for number, layer in enumerate(layers):
        places[Place.of_layer(number, "attention")] = getattr(layer, "self_attn", None)
        places[Place.of_layer(number, "MLP")] = getattr(layer, "mlp", None)
        places[Place.of_layer(number, "output")] = layer
    return {place: module for place, module in places.items() if module is not None}
