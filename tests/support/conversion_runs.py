"""Conversions for tests: models on disk, and many jobs in one launch of ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import transformers
from checkpoint_models import edit_json
from megatron_reset import reset
from safetensors.torch import load_file, save_file

from tools.first_hour.families import VOCAB

# Of float32 logits up to 5 from transformers' in float64. Its own float32 ones are 4.5e-6 from those at most, of all
# models here and with torch's code for any processor (ATEN_CPU_CAPABILITY); other code rounds as much.
TOLERANCE = 1e-5


def variant(source: Path, target: Path, *, tensors=None, **config) -> Path:
    """A copy of a one-file model directory with other config entries, or tensors(weights)."""
    shutil.copytree(source, target)
    edit_json(target / "config.json", **config)
    if tensors is not None:
        weights = load_file(target / "model.safetensors")
        tensors(weights)
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def read_tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a directory's safetensors files, without regard to which file holds them."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def tokens(count: int) -> list[int]:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(3)).tolist()


@torch.no_grad()
def transformers_logits(directory: Path) -> torch.Tensor:
    """Of 64 tokens, in float64."""
    # Its grouped products of experts know no float64.
    options = dict(dtype=torch.float64, experts_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    return model(torch.tensor([tokens(64)])).logits[0]


def only(results: list) -> torch.Tensor:
    """The one rank's result that is not None."""
    found = [result for result in results if result is not None]
    assert len(found) == 1, f"expected the logits on one rank, got them on {len(found)}"
    return torch.from_numpy(found[0])


def run_all(jobs: dict[str, tuple]) -> dict[str, object]:
    """Run each job, (name of a function below, its arguments...), on every rank of this launch."""
    from tools.benchmarking.measure import return_large_blocks

    return_large_blocks()
    results = {}
    for name, (function, *arguments) in jobs.items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                results[name] = globals()[function](*arguments)
            except BaseException as error:
                error.add_note(f"in job {name}; printed:\n{printed.getvalue()[-3000:]}")
                raise
        reset()
    return results


def convert(*words) -> tuple[int, str]:
    """qtarget_megatron.commands.convert_hf: exit code, and its own lines of the output; not those of its progress."""
    code, printed = convert_output(*words)
    own = (line for line in printed.splitlines() if re.match("(import|export|check|qtarget): ", line))
    return code, "\n".join(line for line in own if "GB/s" not in line)


def convert_output(*words) -> tuple[int, str]:
    """qtarget_megatron.commands.convert_hf: exit code and output."""
    from qtarget_megatron.commands.convert_hf import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main([str(word) for word in words])
    return code, printed.getvalue()


def logits(directory: str, *words) -> np.ndarray | None:
    """Logits of the model read straight from the directory, on the one rank that has them.

    An array, as everything that is returned: a tensor travels as a handle that ends with its rank.
    """
    from qtarget_megatron.megatron.jobs.open_model import open_model

    model = open_model(Path(directory), [str(word) for word in words])
    from qtarget_megatron.megatron.jobs.against_transformers import megatron_logits

    found = megatron_logits(model, tokens(model.args.seq_length))
    return None if found is None else found.numpy()


def bytes_read(directory: str, *words) -> int:
    """Bytes of safetensors that this rank reads to fill its part of the model."""
    from qtarget_megatron.huggingface import HFReader
    from qtarget_megatron.megatron.jobs.open_model import open_model

    model = open_model(Path(directory), [str(word) for word in words])
    from qtarget_megatron.megatron.weights.hf_weights import load_hf_weights

    reader = HFReader(directory)
    for chunk in model.chunks:
        load_hf_weights(chunk, reader, model.arch)
    return reader.bytes_read


def reading(directory: str, *words) -> tuple[int, int]:
    """Bytes that this rank reads to fill its part of the model: as HFReader counts them, and as the system does.

    The system counts what read() and pread() return, wherever it comes from; of mapped files it would count nothing.
    """
    from qtarget_megatron.huggingface import HFReader
    from qtarget_megatron.megatron.jobs.open_model import open_model

    def system() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    model = open_model(Path(directory), [str(word) for word in words])
    from qtarget_megatron.megatron.weights.hf_weights import load_hf_weights

    before = system()
    with HFReader(directory) as reader:
        for chunk in model.chunks:
            load_hf_weights(chunk, reader, model.arch)
    return reader.bytes_read, system() - before


def memory(directory: str, ckpt: str, out: str, *words) -> dict[str, tuple[int, int, int]]:
    """Of an import and an export on this rank, made twice: what torch's allocator held at most, by how much the
    resident memory grew, and the bytes of this rank's part of the model.

    The allocator is watched in a run of its own: the profiler that does it holds megabytes of events, more or fewer.
    """
    from qtarget_megatron.megatron.jobs.convert import export_hf, import_hf
    from qtarget_megatron.megatron.jobs.open_model import open_model
    from tools.benchmarking import measure

    words, source = [str(word) for word in words], Path(directory)
    model = open_model(source, words)
    shard = sum(parameter.nbytes for chunk in model.chunks for parameter in chunk.parameters())
    del model
    reset()
    ways = {
        "import": lambda end: import_hf(source, Path(ckpt + end), words),
        "export": lambda end: export_hf(source, Path(ckpt), Path(out + end), words),
    }
    found = {}
    for name, run in ways.items():
        used, _ = measure.memory(measure.Subject(partial(run, "-watched")), torch.device("cpu"))
        reset()
        # Afterwards: what a first run loads into memory is there already.
        _, resident = measure.resident(partial(run, ""))
        reset()
        found[name] = used.peak, resident, shard
    return found


def written_files(*words) -> list[str]:
    """qtarget_megatron.commands.convert_hf export in files of at most 30 KB; those that this rank wrote."""
    from qtarget_megatron.huggingface import HFExport

    written, write = [], HFExport.write_shard
    with (
        small_files(),
        mock.patch.object(
            HFExport, "write_shard", lambda self, file, tensors: (write(self, file, tensors), written.append(file))
        ),
    ):
        code, line = convert("export", *words)
    assert code == 0, line
    return written


@contextlib.contextmanager
def small_files():
    from qtarget_megatron.megatron.weights import hf_weights

    with mock.patch.object(hf_weights, "plan_shards", partial(hf_weights.plan_shards, max_shard_bytes=30_000)):
        yield


def killed_export(after: int, *words) -> None:
    """The same export, whose rank that writes a file too many dies as by SIGKILL once there are so many on the disk."""
    from qtarget_megatron.huggingface import HFExport

    write = HFExport.write_shard

    def die_late(self, file, tensors):
        write(self, file, tensors)
        if len(list(self.directory.folder.glob(".complete/*.sha256"))) >= int(after):
            os._exit(9)

    with small_files(), mock.patch.object(HFExport, "write_shard", die_late):
        convert("export", *words)


def killed_import(*words) -> None:
    """An import whose ranks die as by SIGKILL when Megatron has written the checkpoint, tracker file included."""
    from megatron.training import checkpointing

    save = checkpointing.save_checkpoint

    def die_late(*arguments, **keywords):
        save(*arguments, **keywords)
        os._exit(9)

    with mock.patch.object(checkpointing, "save_checkpoint", die_late):
        convert("import", *words)


def agreement(directory: str, reference: str):
    """(Agreement as a dict, Megatron's logits of the directory)."""
    from qtarget_megatron.megatron.jobs.open_model import open_model

    model = open_model(Path(directory), [])
    from qtarget_megatron.megatron.jobs.against_transformers import compare_with_transformers, megatron_logits

    ids = tokens(model.args.seq_length)
    found = megatron_logits(model, ids)
    return vars(compare_with_transformers(model, Path(reference), ids)), found.numpy()


def divergence(directory: str, reference: str, epsilon_of: str, *words) -> tuple[str, str]:
    """Where the model of directory differs first from transformers' of reference, and the report of it.

    epsilon_of: a norm, as "2.pre_mlp_layernorm", whose epsilon is made another; "" for none.
    """
    from qtarget_megatron.huggingface import report_lines
    from qtarget_megatron.megatron.jobs.open_model import open_model

    model = open_model(Path(directory), [str(word) for word in words])
    from qtarget_megatron.megatron.jobs.against_transformers import compare_with_transformers

    layer, _, norm = epsilon_of.partition(".")
    for chunk in model.chunks if norm else ():
        for block in chunk.decoder.layers:
            number, part = block.layer_number - 1, getattr(block, norm, None)
            if hasattr(chunk, "hybrid_layer_pattern"):
                # Two layers for one, each with one of the norms.
                number, part = number // 2, part if hasattr(part, "eps") else None
            if part is not None and number == int(layer):
                part.eps = 1e-2
    found = compare_with_transformers(model, Path(reference), tokens(model.args.seq_length))
    first = found.first_divergence()
    return str(first and first.place), "\n".join(report_lines(found, 1e-4, str))


def incomplete(directory: str, *words) -> str:
    """What check_complete says where the last stage's chunks are left out."""
    from qtarget_megatron.megatron.jobs.open_model import open_model

    model = open_model(Path(directory), [str(word) for word in words])
    from qtarget_megatron.megatron.weights.hf_weights import check_complete

    last = dist.get_rank() == dist.get_world_size() - 1
    try:
        check_complete(model.chunks[:-1] if last else model.chunks, model.arch)
    except ValueError as error:
        return str(error)
    return "complete"


def plain_megatron(directory: str, checkpoint: str) -> np.ndarray:
    """Logits of Megatron's own GPTModel, own layer spec and own norms, from a checkpoint."""
    from qtarget_megatron.megatron.jobs.open_model import open_model

    args = open_model(Path(directory), []).args
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.checkpointing import load_checkpoint

    model = GPTModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # As a user would, without --finetune: an imported checkpoint starts a training.
    args.load, args.no_load_optim, args.no_load_rng = checkpoint, False, False
    iteration, _ = load_checkpoint([model], None, None)
    assert iteration == 0
    ids = torch.tensor([tokens(args.seq_length)])
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    with torch.no_grad():
        return model(ids, positions, None)[0, :, :VOCAB].numpy()


def layers_with_own_state(directory: str, checkpoint: str) -> list[str]:
    """How a checkpoint loads into layers that keep an extra state, as Transformer Engine's do.

    For each --dist-ckpt-strictness: "loaded", or the error.
    """
    from qtarget_megatron.megatron.jobs.open_model import open_model

    model = open_model(Path(directory), ["--model-class", "gpt"])
    from megatron.training.checkpointing import load_checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    from qtarget_megatron.megatron.model.build import RMSNorm

    expected = {name: p.detach().clone() for name, p in model.chunks[0].named_parameters()}
    outcomes = []
    RMSNorm.get_extra_state = lambda norm: torch.empty(0, dtype=torch.uint8)
    RMSNorm.set_extra_state = lambda norm, state: None
    try:
        for strictness in ("assume_ok_unexpected", "log_unexpected"):
            with torch.no_grad():
                for parameter in model.chunks[0].parameters():
                    parameter.zero_()
            model.args.load, model.args.dist_ckpt_strictness = checkpoint, strictness
            try:
                load_checkpoint(model.wrapped, None, None)
            except CheckpointException as error:
                outcomes.append(str(error))
                continue
            actual = dict(model.chunks[0].named_parameters())
            same = all(torch.equal(actual[name], value) for name, value in expected.items())
            outcomes.append("loaded" if same else "different")
    finally:
        del RMSNorm.get_extra_state, RMSNorm.set_extra_state
    return outcomes


def finetune(*words) -> tuple[int, str]:
    """One run of the fine-tuning program: exit code and output."""
    from qtarget_megatron import finetune as program

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = program.main([str(word) for word in words])
    return code, printed.getvalue()


def checkpoint_names(checkpoint: Path) -> set[str]:
    """Names of the tensors in a torch_dist checkpoint's metadata."""
    from torch.distributed.checkpoint import FileSystemReader

    release = checkpoint / "release"
    kind = json.loads((release / "metadata.json").read_text())["sharded_backend"]
    assert kind == "torch_dist"
    entries = FileSystemReader(release).read_metadata().state_dict_metadata
    return {name for name, entry in entries.items() if hasattr(entry, "size")}
