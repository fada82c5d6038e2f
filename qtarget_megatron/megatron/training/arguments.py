"""Command-line arguments of fine-tuning: ours, and Megatron's as they follow from a Hugging Face config.json."""

from __future__ import annotations

import argparse
import datetime
import math
from pathlib import Path

import torch

from qtarget_megatron import kernels, objectives
from qtarget_megatron.data import alignment
from qtarget_megatron.data.forms import add_data_format
from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.kernels import BACKENDS
from qtarget_megatron.loss.linear_cross_entropy import AUTO
from qtarget_megatron.loss.sparse_teacher import TAIL_RULES
from qtarget_megatron.megatron.runtime.lora_flags import add_lora_flags
from qtarget_megatron.megatron.runtime.model_class import add_model_class
from qtarget_megatron.megatron.runtime.prepare import Purpose, Run

NAN_POLICIES = ("stop", "skip")
LONG_SAMPLES = ("cut", "skip", "refuse")
SAVE_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this package's arguments to a parser (Megatron's own, in finetune)."""
    group = parser.add_argument_group("qtarget: fine-tuning with a designed target distribution")
    group.add_argument(
        "--hf-model",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face directory of the student: architecture from config.json, initial weights from its "
        "safetensors, tokenizer. Each rank reads only its slices; nothing is converted beforehand. Experts are spread "
        "by --expert-model-parallel-size and --expert-tensor-parallel-size; their balance is left as it is, whatever "
        "router_aux_loss_coef says, unless --moe-aux-loss-coeff or --moe-router-bias-update-rate says otherwise. A "
        "coefficient c adds c times the mean of Megatron's balance loss (or z-loss) over the micro-batches to the mean "
        "loss of a supervised token; both, and the update, are over the tokens of the data, padding left out.",
    )
    add_model_class(group)
    group.add_argument(
        "--objective",
        default="sft",
        metavar="NAME",
        help=f"training objective: {', '.join(objectives.names())} (default: sft)",
    )
    group.add_argument(
        "--objective-args",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="parameters of the objective, e.g. eta=0.5",
    )
    group.add_argument(
        "--objective-schedule",
        nargs="+",
        metavar="KEY=FROM:TO@START-END",
        help="parameters of the objective that change over the steps, e.g. eta=0:0.5@0-20%% (from 0 to 0.5 over the "
        "first fifth, 0.5 from there on) or lam=1@0-500,0.1@500-1000 (steps); pieces are linear, with :cosine behind "
        "them half a cosine. Each step logs the values",
    )
    group.add_argument(
        "--objective-file",
        type=Path,
        metavar="FILE",
        help="a Python file of your own that registers objectives with @objectives.register(NAME); it is run on every "
        "rank before --objective is looked up",
    )
    add_lora_flags(group)
    group.add_argument(
        "--teacher-hf",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory of the frozen second model (teacher, reference or base), for the objectives "
        "that read one. It is stacked on the student's pipeline stages; same tokenizer, any size.",
    )
    group.add_argument(
        "--teacher-load",
        type=Path,
        metavar="DIR",
        help="take the second model's weights from this Megatron checkpoint (torch_dist, of any layout), not from "
        "--teacher-hf, whose config.json and tokenizer then describe it",
    )
    group.add_argument(
        "--teacher-ckpt-step", type=int, metavar="N", help="iteration of --teacher-load (default: newest)"
    )
    group.add_argument(
        "--teacher-cache",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="in place of --teacher-hf: the second model's largest probabilities for each token of --sft-train, "
        "written by qtarget cache-teacher at any layout; one for each source, in their order",
    )
    group.add_argument(
        "--teacher-cache-valid", type=Path, nargs="+", metavar="DIR", help="the same for --sft-valid, of other sources"
    )
    group.add_argument(
        "--teacher-tail",
        choices=TAIL_RULES,
        default=TAIL_RULES[0],
        help="what the mass outside of the cached tokens is: spread evenly (uniform), shared as the student shares it "
        "(student), or left out (drop) (default: uniform)",
    )
    group.add_argument(
        "--skip-teacher-cache-check",
        action="store_true",
        help="do not read the whole cache at the start, each rank its share, which finds a flipped bit before hours of "
        "training; each sample is checked when it is drawn in any case",
    )
    group.add_argument(
        "--sft-train",
        nargs="+",
        metavar="FILE[:WEIGHT]",
        help='training data, JSONL: a record in each line, {"messages": [...]}, {"prompt": ..., "completion": ...} or '
        "another form of --data-format. Of several sources an epoch has every sample once, or, with weights, as many "
        "samples in these shares: a.jsonl:0.7 b.jsonl:0.3",
    )
    group.add_argument(
        "--sft-valid",
        nargs="+",
        metavar="[NAME=]FILE",
        help="held-out data, same format; evaluated every --eval-interval steps (default: at the end), as a "
        "whole, every sample once, or its first --eval-iters * --global-batch-size rows. Of several sets each has its "
        "own lines in the log, by its name or the file's",
    )
    add_data_format(group)
    group.add_argument(
        "--pack",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fill each row of --seq-length tokens with whole samples, as many as fit; the flags of batch sizes then "
        "count rows. A sample sees itself alone, and the loss is that of the samples one by one (default: on; "
        "--no-pack gives each sample a row of its own, padded)",
    )
    group.add_argument(
        "--max-tokens-per-row",
        type=int,
        metavar="TOKENS",
        help="fill packed rows up to this many tokens, more than a sample has, which --seq-length cuts (default: "
        "--seq-length)",
    )
    group.add_argument(
        "--long-samples",
        choices=LONG_SAMPLES,
        default=LONG_SAMPLES[0],
        help="samples of more than --seq-length tokens: cut them there, skip them, both counted in the log, or refuse "
        "the first one by name (default: cut)",
    )
    group.add_argument(
        "--epochs",
        type=float,
        metavar="N",
        help="in place of --train-iters: read the training data this often (0.5: half of them); the steps that follow "
        "are printed, and schedules that are given in steps or fractions go by them",
    )
    group.add_argument(
        "--data-date",
        type=iso_date,
        metavar="YYYY-MM-DD",
        help="the date that chat templates write which ask for today's (as Llama 3.2's): one for the whole training "
        "(default: that of the teacher cache, of the checkpoint that training resumes from, or today)",
    )
    group.add_argument(
        "--save-hf",
        type=Path,
        metavar="DIR",
        help="export the trained model there as a Hugging Face directory once training is done; of --lora-rank the "
        "adapters as a PEFT directory",
    )
    group.add_argument(
        "--save-hf-dtype",
        choices=SAVE_DTYPES,
        help="dtype of the exported tensors (default: that of --hf-model, of adapters that of the training; a 16-bit "
        "one rounds away what a short float32 training changed)",
    )
    group.add_argument(
        "--qtarget-backend",
        default="auto",
        choices=BACKENDS,
        help="kernels of the loss (default: auto, native ones for the device)",
    )
    group.add_argument(
        "--qtarget-chunk-size",
        type=chunk_size,
        default=AUTO,
        metavar="TOKENS",
        help="supervised tokens whose logits exist at a time, of student and teacher (default: auto: 512, on a GPU "
        "2048)",
    )
    group.add_argument(
        "--qtarget-materialize-logits",
        action="store_true",
        help="make the logits of a whole micro-batch with Megatron's own output layer: three matrix products, not "
        "four, for memory of micro-batch x sequence x vocabulary",
    )
    group.add_argument(
        "--qtarget-on-nan",
        choices=NAN_POLICIES,
        default=NAN_POLICIES[0],
        help="a micro-batch whose loss or gradient is not finite: stop ends all ranks, naming rank, step and samples; "
        "skip leaves out the whole step on all ranks alike and counts it in the log, which needs --bf16, --fp16 or "
        "--use-distributed-optimizer (default: stop; steps that overflow under --fp16 are always skipped)",
    )
    group.add_argument(
        "--qtarget-max-skips",
        type=int,
        default=20,
        metavar="N",
        help="end the training when so many steps in a row were skipped; under --fp16 as many more as the loss scale "
        "needs to come down (default: 20)",
    )
    group.add_argument(
        "--no-exit-signal-handler",
        action="store_false",
        dest="exit_signal_handler",
        help="let SIGTERM end the ranks at once. By default they finish the step, save to --save, export nothing and "
        "exit with code 143 (128 + the number of --exit-signal); torchrun ends them after 30 s (its "
        "--shutdown-timeout). Costs an all-gather of 4 bytes in each step.",
    )
    group.add_argument(
        "--metrics-jsonl",
        type=Path,
        metavar="FILE",
        help="write every value that is logged, the learning rate and those of evaluations among them, a line of JSON "
        "for each --tensorboard-log-interval; --tensorboard-dir need not be given. A training that resumes goes on in "
        "the same file",
    )
    group.add_argument(
        "--log-arguments",
        action="store_true",
        help="print all of Megatron's arguments at start, about 800 lines; "
        "--logging-level 10 shows these and whatever else torch and Megatron say that is left out",
    )
    group.add_argument("--print-arguments", action="store_true", dest="log_arguments", help=argparse.SUPPRESS)
    group.add_argument(
        "--cpu",
        action="store_true",
        help="run on the CPU over gloo; the default where no GPU is found, refused where one is",
    )
    return parser


def iso_date(text: str) -> str:
    """A date YYYY-MM-DD as it is, for argparse."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a date YYYY-MM-DD, got {text!r}") from None


def chunk_size(text: str) -> int | str:
    """A number of tokens, or AUTO, for argparse, which reads the default as well."""
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {AUTO} or a number of tokens, got {text!r}") from None


def fault_flags() -> list[str]:
    """Megatron flags for how a training ends; the user's own come later and win.

    Megatron's re-run of a step with a NaN is off: it lets the first step of each start pass unchecked, saves what that
    has left of the parameters, and makes the next start stop at once.
    """
    return ["--exit-signal-handler", "--rerun-mode", "disabled"]


TRAINING = Purpose(add_arguments=add_arguments, flags=tuple(fault_flags()))


def fill_in(run: Run) -> None:
    """Values that Megatron insists on, where the user left them out: the defaults of a fine-tuning, and of its plan.
    ValueError where there is no default."""
    args = run.args
    if args.epochs is None and args.train_iters is None and args.train_samples is None and not args.skip_train:
        raise ValueError("--epochs or --train-iters is missing: give one of them")
    if args.lr is None and not args.skip_train:
        raise ValueError("--lr is missing: give it")
    if args.skip_train:
        args.epochs = None
        if args.train_samples is None:
            args.train_iters = args.train_iters or 1
    args.micro_batch_size = args.micro_batch_size or 1
    args.seq_length = args.seq_length or min(4096, run.student.max_sequence_length)
    # None where the two are one.
    args.sample_length = args.seq_length if args.max_tokens_per_row is not None else None
    args.save_interval = args.save_interval or 500
    if args.sft_valid is None or args.full_validation:
        # 0: as a whole, which is what Megatron's flag asks for too.
        args.eval_iters, args.full_validation = 0, False


def apply_nan_choice(args: argparse.Namespace) -> None:
    """Set Megatron's arguments for --qtarget-on-nan skip; ValueError where its optimizer cannot skip a step.

    With a loss scale, here 1, its optimizers look for inf and NaN in the gradients over all ranks that share the model,
    and step on all of them or on none.
    """
    if args.qtarget_max_skips < 1:
        raise ValueError(f"--qtarget-max-skips: expected a number of steps, 1 or more, got {args.qtarget_max_skips}")
    if args.qtarget_on_nan != "skip":
        return
    if not (args.bf16 or args.fp16 or args.use_distributed_optimizer):
        raise ValueError(
            "--qtarget-on-nan skip: Megatron's float32 optimizer always steps: give --use-distributed-optimizer, or "
            "--bf16 or --fp16"
        )
    for key in ("use_megatron_fsdp", "use_torch_fsdp2", "use_layer_wise_distributed_optimizer"):
        if getattr(args, key, False):
            raise ValueError(f"--qtarget-on-nan skip does not go with --{key.replace('_', '-')}: drop one of them")
    if args.loss_scale is None and not args.fp16:
        args.loss_scale = 1.0
    args.check_for_nan_in_loss_and_grad = False


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers of steps, samples, tokens and ranks that are none, in the user's words: Megatron takes a 0 for a
    flag that was not given, or fails later. Raises ValueError."""
    keys = ("micro_batch_size", "global_batch_size", "seq_length", "save_interval", "eval_interval", "log_interval")
    layout = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    steps = () if args.skip_train else ("train_iters", "train_samples")
    for key in (*steps, *keys, *layout, "expert_model_parallel_size", "mtp_num_layers"):
        value = getattr(args, key)
        if value is not None and value < 1:
            more = "; to evaluate or export only, give --skip-train" if key in steps else ""
            raise ValueError(f"--{key.replace('_', '-')}: expected 1 or more, got {value}{more}")
    if args.lr is not None and not 0 <= args.lr < math.inf:
        raise ValueError(f"--lr: expected a number of 0 or more, got {args.lr}")


def check_packing(args: argparse.Namespace) -> None:
    """Refuse flags with which rows of several samples do not go, and lengths of rows that cannot be. Raises
    ValueError."""
    budget = args.max_tokens_per_row
    if not args.pack:
        if budget is not None:
            raise ValueError(
                "--max-tokens-per-row: without packing a sample has a row of --seq-length: drop one of them"
            )
        return
    if budget is not None and budget < args.seq_length:
        raise ValueError(
            f"--max-tokens-per-row {budget} holds no sample of --seq-length {args.seq_length}: give at least that, or "
            "a smaller --seq-length, at which longer samples are cut"
        )
    balanced = args.moe_router_load_balancing_type
    if "seq_aux_loss" in ([balanced] if isinstance(balanced, str) else balanced):
        raise ValueError("seq_aux_loss balances rows, not the samples in them: use aux_loss, or give --no-pack")
    row = budget or args.seq_length
    if row % (unit := alignment(row, args.context_parallel_size)):
        flag = "--seq-length" if budget is None else "--max-tokens-per-row"
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size} cuts rows of a multiple of {unit} "
            f"tokens, got {flag} {row}"
        )
    for key in ("cuda_graph_impl", "external_cuda_graph", "enable_cuda_graph"):
        if getattr(args, key, None) not in (None, False, "none"):
            raise ValueError(
                f"--{key.replace('_', '-')}: a CUDA graph cannot replay rows of other samples: drop it, or give "
                "--no-pack"
            )


def check_epochs(args: argparse.Namespace) -> None:
    """Refuse a number of epochs that is none, and flags that count otherwise. Raises ValueError."""
    if args.epochs is None:
        return
    if not 0 < args.epochs < math.inf:
        raise ValueError(
            f"--epochs: expected a number above 0, got {args.epochs:g}; to evaluate only, give --skip-train"
        )
    for key in ("train_iters", "train_samples", "rampup_batch_size", "step_batch_size_schedule"):
        if getattr(args, key, None):
            raise ValueError(f"--epochs and --{key.replace('_', '-')} both say how long to train: drop one of them")
    for key in ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples"):
        if getattr(args, key, None):
            raise ValueError(
                f"--{key.replace('_', '-')}: with --epochs schedules are given in steps: use "
                f"--{key.replace('_', '-').replace('samples', 'iters')}"
            )


def check_balance(args: argparse.Namespace, arch: Architecture, objective: objectives.Objective) -> None:
    """Refuse a balance loss whose scale a step knows too late. Raises ValueError."""
    coefficients = args.moe_aux_loss_coeff if isinstance(args.moe_aux_loss_coeff, list) else [args.moe_aux_loss_coeff]
    if arch.experts is not None and objective.needs_losses_to_count and any([*coefficients, args.moe_z_loss_coeff]):
        raise ValueError(
            f"objective {objective} divides by a number of tokens that is known after all losses, but "
            "--moe-aux-loss-coeff and --moe-z-loss-coeff are scaled by it before: give another denominator or no "
            "coefficient"
        )


def check_trained(args: argparse.Namespace, arch: Architecture) -> None:
    """Refuse layouts at which Megatron runs a model but does not train it. Raises ValueError."""
    tp = args.tensor_model_parallel_size
    if arch.experts is not None and tp > 1 and not args.sequence_parallel:
        raise ValueError(
            f"Megatron trains experts under tensor parallelism with sequence parallelism only: give "
            f"--sequence-parallel with --tensor-model-parallel-size {tp}"
        )
    if arch.latent is not None and tp > 1 and args.transformer_impl == "local":
        # Each rank gets the gradient of the keys' shared rotary part from its own heads only.
        raise ValueError(
            "Megatron's local layers of latent attention get wrong gradients under tensor parallelism: use "
            f"--tensor-model-parallel-size 1 (got {tp}), expert or pipeline parallelism, or Transformer Engine's layers"
        )


def check_data_flags(args: argparse.Namespace) -> None:
    """Refuse what reads data in Megatron's own way. Raises ValueError."""
    if args.multiple_validation_sets or args.validation_set_names:
        raise ValueError("several held-out sets are given as --sft-valid NAME=FILE NAME=FILE: drop Megatron's flags")
    if args.iterations_to_skip and args.tensor_model_parallel_size > 1:
        raise ValueError(
            "--iterations-to-skip needs --tensor-model-parallel-size 1, where Megatron's own reading of batches fits "
            f"this data, got {args.tensor_model_parallel_size}"
        )


def check_backend(args: argparse.Namespace, *, on_cpu: bool) -> None:
    """Refuse kernels that are not there or do not serve the device, before a model is built. Raises ValueError."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    kernels.choose(args.qtarget_backend, "cpu" if on_cpu else "cuda", dtype)


def check_head(args: argparse.Namespace) -> None:
    """Refuse flags under which the output layer's weight must be used by its own module only. Raises ValueError."""
    if args.qtarget_chunk_size != AUTO and args.qtarget_chunk_size < 1:
        raise ValueError(f"--qtarget-chunk-size must be a number of tokens, 1 or more, got {args.qtarget_chunk_size}")
    if args.qtarget_materialize_logits:
        return
    for key in ("use_megatron_fsdp", "use_torch_fsdp2", "defer_embedding_wgrad_compute"):
        if getattr(args, key, False):
            raise ValueError(
                f"--{key.replace('_', '-')} needs Megatron's own output layer: give --qtarget-materialize-logits"
            )
