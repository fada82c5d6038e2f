"""The model in a Megatron distributed checkpoint (torch_dist), whatever layout it was saved at.

Imports of Megatron wait until the CPU platform is active.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from qtarget_megatron.huggingface import Architecture, is_finite
from qtarget_megatron.megatron.weights.checkpoint_folder import checkpoint_directory, saved_argument

if TYPE_CHECKING:
    from megatron.core.models.common.language_module.language_module import LanguageModule

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class SavedModel:
    """Names and shapes of what a Megatron checkpoint holds.

    directory: of its iteration.
    flag:      by which the user gave it.
    shapes:    of the model's tensors.
    dtype:     of all of them, float32 where they differ.
    args:      the arguments saved with it.
    """

    directory: str
    flag: str
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    metadata: dict
    args: argparse.Namespace

    @property
    def has_further(self) -> bool:
        """Whether it holds heads of multi-token prediction."""
        return any(key.startswith("mtp.") for key in self.shapes)

    @classmethod
    def read(cls, load: str | Path, step: int | None = None, *, flag: str = "--load") -> SavedModel:
        """Headers only. step: default the newest iteration. ValueError where there is no distributed checkpoint."""
        from megatron.core import dist_checkpointing

        directory = checkpoint_directory(load, step, flag=flag)
        common = dist_checkpointing.load_common_state_dict(directory)
        tensors = {
            key: tensor
            for key, tensor in dist_checkpointing.load_tensors_metadata(directory).items()
            if not key.startswith(("optimizer.", "chained_"))
        }
        # The correction of a router's scores is float32 in any model.
        dtypes = {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".router.expert_bias")}
        return cls(
            directory=directory,
            flag=flag,
            shapes={key: tuple(tensor.global_shape) for key, tensor in tensors.items()},
            dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
            metadata=dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {},
            args=common.get("args") or argparse.Namespace(),
        )

    def check_fits(self, chunks: list[LanguageModule], arch: Architecture, source: str) -> None:
        """ValueError unless checkpoint and model have the same tensors; collective over all ranks.

        arch: the model's, which source names. Megatron itself ignores tensors that it did
        not ask for, and cuts or pads a vocabulary of another size. Heads of multi-token prediction in the checkpoint
        are left there where the model has none.
        """
        problems = [
            f"{ours} {expected} by config.json, {actual} in the checkpoint"
            for ours, expected, theirs in (
                ("vocab_size", arch.vocab_size, "vocab_size"),
                ("rms_norm_eps", arch.norm_epsilon, "layernorm_epsilon"),
            )
            if (actual := getattr(self.args, theirs, None)) not in (None, expected)
        ]
        wanted = self._wanted(chunks)
        stored = {key: shape for key, shape in self.shapes.items() if arch.has_further or not key.startswith("mtp.")}
        for key in sorted(wanted.keys() | stored.keys()):
            if key not in wanted or key not in stored:
                where = "missing from" if key in wanted else "only in"
                problems.append(f"{key} {where} the checkpoint")
                continue
            ours, theirs = wanted[key], stored[key]
            if key in _VOCABULARY:
                # Padded differently at each tensor-parallel size.
                same = ours[1:] == theirs[1:] and theirs[0] >= arch.vocab_size
            else:
                same = ours == theirs
            if not same:
                problems.append(f"{key} {list(ours)} by config.json, {list(theirs)} in the checkpoint")
        if problems:
            more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
            raise ValueError(
                f"{self.flag} {self.directory} is not a checkpoint of {source}: {'; '.join(problems[:2])}{more}; give "
                "the directory that it was imported from"
            )

    def load_into(self, chunks: list[LanguageModule], args: argparse.Namespace, arch: Architecture) -> None:
        """Fill the chunks of this rank where they are, in their dtype, args.params_dtype; collective over all ranks.
        ValueError where a weight is missing, NaN or infinite, or not what was saved.

        Beside the chunks, memory is needed for one tensor as it was saved, that of one tensor-parallel rank.
        """
        from megatron.core import dist_checkpointing

        from qtarget_megatron.megatron.weights.fingerprint import ATTRIBUTE, Fingerprints

        mine = [tensor for chunk in chunks for tensor in self._tensors(chunk)]
        # torch keeps a tensor that it has read until it has read the next: the largest are read by themselves.
        for key in (*_VOCABULARY, None):
            wanted = {
                str(number): tensor
                for number, tensor in enumerate(mine)
                if (tensor.key == key if key else tensor.key not in _VOCABULARY)
            }
            expected = {number: tensor.key for number, tensor in wanted.items()}
            loaded = dist_checkpointing.load(wanted, self.directory, strict="log_unexpected")
            if missing := [name for number, name in expected.items() if number not in loaded]:
                raise ValueError(
                    f"{self.flag} {self.directory} did not give {missing[0]}: the checkpoint is incomplete"
                )
        step_flag = self.flag.replace("load", "ckpt-step")
        for tensor in mine:
            if tensor.data is not None and not is_finite(tensor.data):
                name = tensor.key + (f" of layer {tensor.global_offset[0]}" if tensor.prepend_axis_num else "")
                raise ValueError(
                    f"{self.flag} {self.directory}: expected finite weights, got NaN or infinity in {name}: take an "
                    f"earlier iteration ({step_flag})"
                )
        Fingerprints(args, arch).compare_weights(
            chunks, getattr(self.args, ATTRIBUTE, None), self.directory, step_flag=step_flag
        )

    def _tensors(self, chunk: LanguageModule) -> list:
        """A chunk's tensors by their name in the checkpoint, as Megatron's ShardedTensors over the chunk's memory. What
        is none, a state that Transformer Engine asks for and local layers do not save, is left out."""
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

        state = self._sharded(chunk)
        apply_factories(state)
        return [tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]

    def _sharded(self, chunk: LanguageModule) -> dict:
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return chunk.sharded_state_dict(metadata={**self.metadata, "dp_cp_group": group})

    def _wanted(self, chunks: list[LanguageModule]) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that all ranks together would load, by their name in the checkpoint."""
        mine = {t.key: tuple(t.global_shape) for chunk in chunks for t in self._tensors(chunk)}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return {key: shape for shapes in everyone for key, shape in shapes.items()}


def check_resumed_experts(args: argparse.Namespace, arch: Architecture) -> None:
    """ValueError where args resume a training whose optimizer Megatron cannot load at this layout.

    Experts that are spread over ranks have an optimizer of their own, so its states do not move to a layout where they
    are not, nor back. arch: of the model in args.load. The CPU platform must have been activated.
    """
    from megatron.core import dist_checkpointing

    if arch.experts is None or args.load is None or args.finetune or args.no_load_optim:
        return
    directory = checkpoint_directory(args.load, args.ckpt_step)
    saved = dist_checkpointing.load_common_state_dict(directory).get("args")
    before = getattr(saved, "expert_model_parallel_size", None)
    ours = args.expert_model_parallel_size
    if before is not None and (before == 1) != (ours == 1):
        raise ValueError(
            f"--load {args.load} was saved with --expert-model-parallel-size {before}: its optimizer states load with "
            f"{'that size' if before == 1 else 'any size above 1'} only, got {ours}; change it, or take the weights "
            "alone with --finetune"
        )


def check_saved_heads(args: argparse.Namespace) -> None:
    """ValueError where args load a checkpoint that has not the heads of multi-token prediction that they ask for, or
    resume a training with others. The CPU platform must have been activated."""
    directory = checkpoint_directory(args.load, args.ckpt_step)
    saved, given = saved_argument(Path(directory), "mtp_num_layers"), args.mtp_num_layers
    drops = given is None and (args.finetune or args.no_load_optim)
    if saved != given and not drops:
        raise ValueError(
            f"--load {args.load} was saved with --mtp-num-layers {saved}, got {given}: give the same, or none with "
            "--finetune, or start from --hf-model"
        )
