"""Fine-tune a Hugging Face model on Megatron with a designed target distribution.

    torchrun --nproc-per-node 8 -m qtarget_megatron.finetune \\
        --hf-model DIR --teacher-hf TEACHER_DIR --sft-train train.jsonl \\
        --objective target-sft --objective-args eta=0.5 \\
        --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel --bf16 \\
        --seq-length 4096 --micro-batch-size 1 --global-batch-size 128 --train-iters 1000 --lr 1e-5 \\
        --save CKPT --save-hf OUT

Every Megatron flag works (--help-megatron lists them): training is Megatron's own pretrain(), with its optimizers,
schedules, checkpoints and logs. The shape of the model comes from --hf-model and needs no flag.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from qtarget_megatron import objectives
from qtarget_megatron._version import versions
from qtarget_megatron.command_line import Parser
from qtarget_megatron.data import open_records
from qtarget_megatron.huggingface import EXPERTS, InitialFactors, adapter_numbers, check_tensors, further_reader
from qtarget_megatron.huggingface.adapters.peft_directory import PeftDirectory, not_loaded
from qtarget_megatron.loss.second_model import check_vocabulary
from qtarget_megatron.megatron.faults import ending, same_start
from qtarget_megatron.megatron.faults.explained import explained
from qtarget_megatron.megatron.faults.resume_point import (
    iteration_folder,
    names_iteration,
    newest_complete,
    prepare_start,
)
from qtarget_megatron.megatron.faults.watchdog import Watchdog
from qtarget_megatron.megatron.model.teacher_cost import TeacherCost
from qtarget_megatron.megatron.runtime import cpu_platform, launch, wheel_repairs
from qtarget_megatron.megatron.runtime.architecture_flags import (
    record_architecture,
)
from qtarget_megatron.megatron.runtime.gpu_flags import check_fine_tuning
from qtarget_megatron.megatron.runtime.layout_checks import check_experts, check_layout, check_whole_stages
from qtarget_megatron.megatron.runtime.lora_flags import check_saved_lora, saved_lora
from qtarget_megatron.megatron.runtime.prepare import Run, prepare
from qtarget_megatron.megatron.runtime.progress import Progress
from qtarget_megatron.megatron.training import outputs
from qtarget_megatron.megatron.training.arguments import (
    TRAINING,
    add_arguments,
    apply_nan_choice,
    check_backend,
    check_balance,
    check_data_flags,
    check_epochs,
    check_head,
    check_numbers,
    check_packing,
    check_trained,
    fill_in,
)
from qtarget_megatron.megatron.training.metrics import MetricsFile
from qtarget_megatron.megatron.training.resume_flags import ResumedFlags, check_lengths, check_schedule, read_saved
from qtarget_megatron.megatron.training.second_model_flags import check_second_model_flags, data_paths, open_caches
from qtarget_megatron.megatron.verify.problem import try_evaluate
from qtarget_megatron.megatron.weights.checkpoint_folder import (
    checkpoint_directory,
    saved_argument,
    saved_arguments,
)
from qtarget_megatron.megatron.weights.saved_model import SavedModel, check_resumed_experts, check_saved_heads
from qtarget_megatron.teacher_cache import TeacherCache

if TYPE_CHECKING:
    from qtarget_megatron.megatron.training.datasets import DatasetProvider
    from qtarget_megatron.megatron.verify.recording import Recording

_log = logging.getLogger("qtarget_megatron")


def main(argv: list[str] | None = None) -> int:
    """Run fine-tuning with command-line words; returns the process's exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        fine_tune(argv)
        return 0

    return ending.exit_code("finetune", command)


def command_line() -> Parser:
    """The parser of its own flags; Megatron's are not among them."""
    parser = Parser(
        prog="qtarget finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=versions(), help="print versions and exit")
    parser.add_argument("--help-megatron", action="store_true", help="list Megatron's flags")
    parser.add_argument("--help-objectives", action="store_true", help="list the objectives with their formulas")
    add_arguments(parser)
    return parser


def fine_tune(argv: list[str], recording: Recording | None = None) -> None:
    """Check everything that can be checked, then train, then export. ValueError for bad input.

    recording: keeps what is computed, for a comparison.
    """
    parser = command_line()
    if "--help-megatron" in argv:
        cpu_platform.activate()
        launch.print_flags()
        return
    if "--help-objectives" in argv:
        print(objectives.describe())
        return
    parser.parse_known_args(argv)
    run = prepare(argv, TRAINING)
    args = run.args
    check_numbers(args)
    objective = run.objective
    if args.objective_file is not None:
        try_evaluate(objective)
    fill_in(run)
    apply_nan_choice(args)
    check_backend(args, on_cpu=run.on_cpu)
    check_fine_tuning(args, live_teacher=args.teacher_hf is not None or args.teacher_self, on_cpu=run.on_cpu)
    _check(run)
    _check_models(run)
    caches = open_caches(run)

    wheel_repairs.repair_megatron_wheel()
    args.calculate_per_token_loss = True
    record_architecture(args, run.student)
    store = same_start.open_store(args)
    keys = same_start.for_this_run(store) if store is not None and args.world_size > 1 else None
    if args.rank == args.world_size - 1:
        outputs.check_board(args)
    iteration, done, args.data_date = _agree(run, keys)
    if done:
        return
    launch.initialize(args)
    if args.metrics_jsonl is not None and args.rank == args.world_size - 1:
        wheel_repairs.replace_tensorboard_writer(partial(MetricsFile, args.metrics_jsonl))
    if args.max_tokens_per_row is not None:
        # Megatron's validation compares it with the positions of a sample, which --seq-length bounds.
        args.seq_length = args.max_tokens_per_row
    if args.save is not None and not args.skip_train:
        launch.prepare_saves(in_background=args.async_save)
    with Watchdog(args, keys, args.rank, args.world_size) as watchdog, ending.described(args, watchdog):
        try:
            launch.initialize_distributed(store)
            datasets = _inspected(run, caches)
            _skip_what_is_done(args, iteration)
            _train(run, datasets, _resumed_flags(args), watchdog, recording)
        except SystemExit as stop:
            raise ending.early_end(args, stop) from None
        except BaseException as error:
            fault = explained(error, args, watchdog)
            if fault is None:
                raise
            raise fault from error


def _agree(run: Run, store: dist.Store | None) -> tuple[int | None, bool, str]:
    """Compare what all ranks have been started with; the iteration that the training continues from, if any, whether
    nothing is left to do, and the date of the data."""
    args = run.args

    def lead() -> tuple[int | None, bool, str]:
        outputs.reserve(args)
        found = prepare_start(args)
        for line in found.messages:
            _log.info(line)
        done = outputs.check_outputs(args, run.student, found.iteration)
        if done:
            _log.info(
                "all %d steps have been trained, and %s holds the exported model: nothing is left to do",
                found.iteration,
                args.save_hf,
            )
        date = args.data_date
        if date is None and found.iteration and not args.finetune:
            date = saved_argument(iteration_folder(args.load, found.iteration), "data_date")
        return found.iteration, done, date or datetime.date.today().isoformat()

    if store is None:
        return lead()
    return same_start.agree(store, args.rank, args.world_size, same_start.identity(args, run.words), lead)


def _inspected(run: Run, caches: dict[Path, TeacherCache]) -> DatasetProvider:
    """The data, read once, with the lengths of the training that follow from them. Collective."""
    from qtarget_megatron.megatron.training.datasets import DatasetProvider

    datasets = DatasetProvider(run.args, run.tokenizer, run.objective, caches)
    datasets.inspect()
    if run.args.epochs is not None:
        check_lengths(run.args)
    return datasets


def _skip_what_is_done(args: argparse.Namespace, iteration: int | None) -> None:
    """A training that was complete when its end, as the export, was cut short: Megatron would find no samples left, or
    write the last checkpoint over itself, where a second end could ruin it."""
    steps = outputs.steps_of(args)
    if iteration is not None and 0 < steps <= iteration and not (args.finetune or args.skip_train):
        args.skip_train = True
        _log.info("all %d steps have been trained: going on with what follows", steps)


def _resumed_flags(args: argparse.Namespace) -> ResumedFlags:
    """What changes with the flags in a training that resumes, which is logged."""
    flags = ResumedFlags(args, read_saved(args))
    for line in flags.lines:
        _log.info(line)
    return flags


def _check(run: Run) -> None:
    """What needs no file but the small ones: objective, layout, data, output directory."""
    args, student, objective = run.args, run.student, run.objective
    check_second_model_flags(args, objective)
    check_layout(args, student, "student")
    check_experts(args, student, "student")
    if not args.skip_train:
        check_trained(args, student)
        check_balance(args, student, objective)
    check_whole_stages(args, student, "student")
    check_head(args)
    check_data_flags(args)
    check_packing(args)
    check_epochs(args)
    check_schedule(args)
    if args.sft_train is None and not args.skip_train:
        raise ValueError("there is nothing to train on: give --sft-train FILE (or --skip-train to evaluate only)")
    args.data_digest = _data_digest(args)
    args.end = outputs.end_of(args)
    resumes = None not in (args.load, args.save) and Path(args.load).absolute() == Path(args.save).absolute()
    if not resumes and launch.has_checkpoint(args.save):
        raise ValueError(
            f"--save {args.save} holds a checkpoint already: give --load {args.save} to resume from it, or save to "
            "another directory"
        )
    nothing = args.load is not None and not launch.has_checkpoint(args.load) and newest_complete(args.load) is None
    if nothing and not resumes:
        raise ValueError(
            f"--load {args.load}: expected a Megatron checkpoint (latest_checkpointed_iteration.txt), found none: drop "
            "--load to start from --hf-model"
        )
    # Megatron ends the process where the tracker file is damaged; prepare_start() mends it, or says what to do. What
    # other formats hold is not known before they are loaded.
    torch_dist = args.ckpt_format == "torch_dist"
    if run.schedule is not None:
        known = args.train_iters or args.train_samples or args.epochs
        run.schedule.check_length(None if known is None else 1)
    if run.lora is not None and not torch_dist:
        raise ValueError(f"--ckpt-format {args.ckpt_format}: adapters are saved as torch_dist: drop the flag")
    if torch_dist and launch.has_checkpoint(args.load) and names_iteration(Path(args.load)):
        folder = checkpoint_directory(args.load, args.ckpt_step)
        check_saved_lora(args.load, saved_arguments(Path(folder)), run.lora)
        check_resumed_experts(args, student)
        check_saved_heads(args)


def _data_digest(args: argparse.Namespace) -> dict[str, list[str]]:
    """SHA-256 of each source, by flag. ValueError for one that cannot be read, or is empty."""
    found: dict[str, list[str]] = {}
    for flag, paths in data_paths(args).items():
        for path in paths:
            records = open_records(path, args.data_format)
            if len(records) == 0:
                raise ValueError(f"data file {str(path)!r} holds no records: expected a record of JSON in each line")
            found.setdefault(flag, []).append(records.digest)
    return found


def _check_models(run: Run) -> None:
    """Weights and tokenizers of both models, headers only."""
    args, saved = run.args, None
    _ = run.tokenizer
    fate = f"--mtp-num-layers {run.student.further_layers} trains them, otherwise exports copy them"
    if run.lora is not None:
        fate = "they have no adapters"
    run.check_weights(fate)
    if args.save_hf is not None and (further := further_reader(args.hf_model, run.student)) is not None:
        # What the export will copy, seen before the training.
        check_tensors(further, run.student.with_further())
    if args.teacher_hf is None:
        return
    if args.teacher_load is not None:
        saved = SavedModel.read(args.teacher_load, args.teacher_ckpt_step, flag="--teacher-load")
        if saved_lora(saved.args) is not None:
            raise ValueError(
                f"--teacher-load {args.teacher_load} holds adapters, no model: export it (qtarget export "
                "--lora-merge), and give that directory as --teacher-hf"
            )
    run.add_teacher(args.teacher_hf, "--teacher-hf", weights=saved)
    check_vocabulary(run.objective, run.teacher.vocab_size, run.student.vocab_size)


def _train(
    run: Run, datasets: DatasetProvider, flags: ResumedFlags, watchdog: Watchdog, recording: Recording | None
) -> None:
    # Megatron is imported only now: the CPU platform acts before it.
    from qtarget_megatron.megatron.attach import attach
    from qtarget_megatron.megatron.faults.loss_check import LossCheck
    from qtarget_megatron.megatron.faults.soundness import Soundness
    from qtarget_megatron.megatron.model.build import ModelProvider
    from qtarget_megatron.megatron.model.lora import merge_adapters
    from qtarget_megatron.megatron.model.old_policy import OldPolicy
    from qtarget_megatron.megatron.training.checkpoint_hooks import watch_checkpoints
    from qtarget_megatron.megatron.training.pace import Pace
    from qtarget_megatron.megatron.training.step import StepSettings, forward_step
    from qtarget_megatron.megatron.weights.adapters import check_base, record_base, save_adapters
    from qtarget_megatron.megatron.weights.hf_weights import save_hf_weights
    from qtarget_megatron.megatron.weights.layer_names import named_parameters

    args, student, teacher, objective = run.args, run.student, run.teacher, run.objective
    from_checkpoint, teacher_cost = launch.has_checkpoint(args.load), TeacherCost()
    smaller = teacher is not None and teacher.vocab_size < student.vocab_size
    lora, factors, peft = run.lora, None, None
    if lora is not None and not from_checkpoint:
        peft = None if args.lora_from is None else PeftDirectory(args.lora_from, student)
        factors = peft or InitialFactors(student, lora, args.seed)

    def check_start(chunks: list) -> None:
        if peft is not None:
            check_base(args, student, chunks, peft.base, f"--lora-from {args.lora_from}")

    models = ModelProvider(
        args,
        student,
        teacher,
        load_weights=not from_checkpoint or lora is not None,
        teacher_weights=run.teacher_weights,
        teacher_cost=teacher_cost,
        lora=lora,
        factors=factors,
        teaches_itself=args.teacher_self,
        keeps_old_policy=bool(objective.refresh),
        finish=partial(
            attach,
            objective=objective,
            vocab_size=student.vocab_size,
            chunk_size=None if args.qtarget_materialize_logits else args.qtarget_chunk_size,
            backend=args.qtarget_backend,
            teacher_vocab_size=teacher.vocab_size if smaller else None,
            second_model=objective.needs_teacher,
        ),
        check=check_start,
    )
    origin = f"the checkpoint in {args.load}" if from_checkpoint else f"the weights of {args.hf_model}"
    if lora is not None:
        origin += f" with the adapters of {args.lora_from}" if peft else ""
        numbers = adapter_numbers(student, lora)
        _log.info(
            "adapters of rank %d on %s: %s parameters are trained, the model stays as it is",
            *(lora.rank, " ".join(lora.targets), f"{numbers:,}"),
        )
        if student.experts is not None and EXPERTS not in lora.targets:
            _log.info("the experts have no adapters: --lora-targets experts would give each of them some")
        if (targets := not_loaded(student, lora)) is not None and args.save_hf is not None and not args.lora_merge:
            _log.warning(
                "PEFT with transformers 5 does not load the adapters of %s in a %s model: --lora-merge exports a whole "
                "model, also later (qtarget export)",
                *(targets, student.family),
            )
    _log.info("objective %s, starting from %s", run.schedule or objective, origin)
    if objective.note:
        _log.info("%s: %s", objective.name, objective.note)
    if args.mtp_num_layers and not from_checkpoint and not student.has_further:
        _log.info("the %d head(s) of --mtp-num-layers start from random weights", args.mtp_num_layers)
    settings = StepSettings(
        objective,
        teacher_tail=args.teacher_tail,
        teacher_cost=teacher_cost,
        loss_check=LossCheck(datasets.record_names),
        packed=args.pack,
        held_out=datasets.held_out_names,
        scheduled=None if run.schedule is None else partial(_of_this_step, run.schedule, args),
        renew=OldPolicy(objective.refresh, partial(_this_step, args)).renew
        if objective.refresh
        else lambda model: None,
    )
    on_nan = args.qtarget_on_nan if args.check_for_nan_in_loss_and_grad or args.qtarget_on_nan == "skip" else None
    soundness = Soundness(args, models.built, from_checkpoint=from_checkpoint, named=named_parameters)
    watch_checkpoints(args, student, models.built, flags)
    step = Pace(args).watched(soundness.watched(partial(forward_step, settings, on_nan)))
    if recording is not None:
        step = recording.watched(step, args, models.built, student, lora)
    launch.run_pretrain(
        args,
        datasets=datasets,
        model_provider=models,
        forward_step=watchdog.watched(step),
    )
    launch.flush_writer()
    soundness.finish()
    if recording is not None:
        recording.finish()
    if args.save_hf is not None and lora is not None and not args.lora_merge:
        dtype = getattr(torch, args.save_hf_dtype) if args.save_hf_dtype else args.params_dtype
        base = record_base(args, student, models.built)
        digests = save_adapters(
            models.built, student, lora, args.save_hf, dtype, base=base, base_name=str(args.hf_model)
        )
        if args.rank == 0:
            outputs.record_export(args, digests)
        _log.info("exported the adapters to %s, a PEFT directory for %s", args.save_hf, args.hf_model)
    elif args.save_hf is not None:
        for model in models.built if lora is not None else ():
            merge_adapters(model)
        dtype = getattr(torch, args.save_hf_dtype) if args.save_hf_dtype else student.dtype

        def progress(total: int):
            return Progress("qtarget_megatron: writing", total, unit="GB", scale=1e9).add

        # Layers that predict further tokens, where they are not trained.
        further = None if args.mtp_num_layers else further_reader(args.hf_model, student)
        exported = student if further is None else student.with_further()
        digests = save_hf_weights(
            models.built, exported, args.hf_model, args.save_hf, dtype, further=further, progress=progress
        )
        if args.rank == 0:
            outputs.record_export(args, digests)
        more = "" if lora is None else ", with the adapters merged"
        more += "" if further is None else ", with the layers of --hf-model that predict further tokens"
        if args.mtp_num_layers and not student.has_further:
            more = ", without the heads of --mtp-num-layers, which checkpoints keep"
        _log.info("exported the model to %s%s", args.save_hf, more)
    _report_peak_memory()


def _of_this_step(
    schedule: objectives.ScheduledObjective, args: argparse.Namespace
) -> tuple[objectives.Objective, dict[str, float]]:
    """The objective of Megatron's current step, and its scheduled parameters. Held-out data have that of the last
    step."""
    step = _this_step(args)
    values = schedule.values(step, args.train_iters)
    return schedule.at(step, args.train_iters), dict(zip(schedule.parameters, values, strict=True))


def _this_step(args: argparse.Namespace) -> int:
    """Steps before Megatron's current one."""
    return getattr(args, "curr_iteration", args.iteration)


def _report_peak_memory() -> None:
    peaks = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, torch.cuda.max_memory_allocated())
    _log.info("peak memory per rank (GiB): %s", " ".join(f"{peak / 2**30:.2f}" for peak in peaks))


if __name__ == "__mp_main__":
    launch.end_with_parent()
if __name__ == "__main__":
    ending.run("finetune", main)
