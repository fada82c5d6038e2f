"""Fine-tune SmolLM2-135M-Instruct on GSM8K with Target-SFT on six CPU ranks, and show what changed.

    python -m examples.demo.run [--out FOLDER] [--lora] [--objective NAME --objective-args KEY=VALUE ...]

Six processes (tensor parallel 3 x pipeline parallel 2) run Megatron's training loop; the teacher is
the model before training. Then transformers opens the exported model, answers a held-out question
and scores held-out solutions. The output folder appears or is replaced only when all of it worked.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from examples.demo import report
from examples.demo.launch import LaunchFailed, launch, sigterm_as_interrupt
from examples.demo.prepare import MODEL_FOLDER, cache_directory, prepare

TENSOR_PARALLEL = 3  # the model has 3 key/value heads
PIPELINE_PARALLEL = 2
PARAMETERS = 134_515_008
MICRO_BATCH_SIZE = 1
LORA_RANK = 16
# Adapters begin at zero and span few directions: they want larger steps than all weights do.
LEARNING_RATE, LORA_LEARNING_RATE = 5e-5, 1e-3
# The held-out records that transformers scores are those that Megatron evaluates.
SCORED_RECORDS = 8
SCORED_FILE = "valid.jsonl"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Settings:
    """What one demo run does."""

    out: Path
    objective: str = "target-sft"
    objective_args: list[str] = field(default_factory=lambda: ["eta=0.5"])
    steps: int = 6
    global_batch_size: int = 3
    seq_length: int = 512
    learning_rate: float = LEARNING_RATE
    lora: bool = False

    @property
    def title(self) -> str:
        """The objective with its parameters, and LoRA where adapters are trained."""
        return " ".join([self.objective, *self.objective_args, *(["(LoRA)"] if self.lora else [])])


def finetune_command(settings: Settings, prepared, work: Path) -> list[str]:
    """Return the torchrun command line of the training run, results going to `work`."""
    # Imported late: it brings torch, which --help does not need.
    from qtarget_megatron import objectives

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--local-addr", LOOPBACK]
    launcher += ["--nproc-per-node", str(TENSOR_PARALLEL * PIPELINE_PARALLEL)]
    words = {
        "--hf-model": prepared.model,
        "--sft-train": prepared.train,
        "--sft-valid": work / SCORED_FILE,
        "--objective": settings.objective,
        "--tensor-model-parallel-size": TENSOR_PARALLEL,
        "--pipeline-model-parallel-size": PIPELINE_PARALLEL,
        "--seq-length": settings.seq_length,
        "--micro-batch-size": MICRO_BATCH_SIZE,
        "--global-batch-size": settings.global_batch_size,
        "--train-iters": settings.steps,
        "--lr": settings.learning_rate,
        "--lr-decay-style": "constant",
        "--lr-warmup-iters": min(2, settings.steps - 1),
        "--clip-grad": 1.0,
        "--weight-decay": 0.0,
        # Halfway; Megatron evaluates by itself at the end.
        "--eval-interval": settings.steps // 2 + 1,
        "--log-interval": 1,
        "--tensorboard-log-interval": 1,
        "--tensorboard-dir": work / "tensorboard",
        "--save": work / "checkpoint",
        "--save-interval": settings.steps,
        "--save-hf": work / "model",
    }
    command = launcher + ["-m", "qtarget_megatron.finetune", "--cpu"]
    command += [str(word) for pair in words.items() for word in pair]
    if settings.lora:
        command += ["--lora-rank", str(LORA_RANK), "--lora-merge"]
    if objectives.from_arguments(settings.objective, settings.objective_args).needs_teacher:
        # Either way the teacher is the model before training.
        command += ["--teacher-self"] if settings.lora else ["--teacher-hf", str(prepared.model)]
    if settings.objective_args:
        command += ["--objective-args", *settings.objective_args]
    return command


def training_environment() -> dict[str, str]:
    """Return this process' environment, arranged for CPU ranks that talk over the loopback."""
    env = dict(os.environ)
    env.update(
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",  # the demo is the same with and without a GPU
        PYTHONUNBUFFERED="1",
        TOKENIZERS_PARALLELISM="false",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
    )
    if Path("/sys/class/net/lo").exists():
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env


def run(settings: Settings, cache: Path) -> None:
    """Do the whole demo.

    Raises:
        ValueError: something the user can mend, in one line.
        LaunchFailed: the training processes failed.
    """
    from examples.demo.answers import Answerer

    check_out(settings.out)
    check_room(settings, cache)
    with step("1/5 prepare the model and the data"):
        prepared = prepare(cache)
    records = [json.loads(line) for line in prepared.valid.read_text("utf-8").splitlines()]
    question, solution = (message["content"] for message in records[0]["messages"])

    with finished_output(settings.out) as work:
        with step("2/5 look at the model before (transformers)"):
            answerer = Answerer(prepared.model)
            answer_before = answerer.answer(question)
            before = answerer.score(records[:SCORED_RECORDS], settings.seq_length)
            del answerer
            print(f"question: {question}\nanswer:   {answer_before}")

        lines_of_scored = (json.dumps(record) + "\n" for record in records[:SCORED_RECORDS])
        (work / SCORED_FILE).write_text("".join(lines_of_scored), "utf-8")
        ranks = TENSOR_PARALLEL * PIPELINE_PARALLEL
        with step(
            f"3/5 train: {settings.title}, {ranks} ranks "
            f"(tensor parallel {TENSOR_PARALLEL} x pipeline parallel {PIPELINE_PARALLEL})"
        ):
            print(f"full log: {work / 'train.log'}", flush=True)
            lines: list[report.StepLine] = []
            peaks = launch(
                finetune_command(settings, prepared, work),
                env=training_environment(),
                log=work / "train.log",
                on_line=lambda line: follow(line, lines),
            )

        with step("4/5 look at the exported model (transformers)"):
            answerer = Answerer(work / "model")
            answer_after = answerer.answer(question)
            after = answerer.score(records[:SCORED_RECORDS], settings.seq_length)
            del answerer

        with step("5/5 report"):
            scalars = report.read_scalars(work / "tensorboard")
            report.check_export(scalars, after)
            summary = report.summarise(
                scalars,
                lines,
                peaks,
                before,
                after,
            )
            summary["settings"] = asdict(settings) | {"out": str(settings.out)}
            report.draw_curves(scalars, f"{settings.title} on GSM8K problems", work / "curves.png")
            answers = report.markdown_answers(question, solution, answer_before, answer_after)
            print("\n" + report.write_report(work, summary, answers))

    print(f"Everything is in {settings.out}: model/ (opens with transformers), checkpoint/ ")
    print("(Megatron's), tensorboard/, train.log, report.md, report.json, curves.png")


def follow(line: str, lines: list[report.StepLine]) -> None:
    """Print a logged step as one compact line and remember it.

    The console's second value is Megatron's mean of the first two steps; the report reads
    TensorBoard, which has each step's own.
    """
    parsed = report.parse_step_line(line)
    if parsed is not None:
        lines.append(parsed)
        print(f"  {parsed.compact()}", flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Announce a step and print how long it took."""
    print(f"\n[{name}]", flush=True)
    started = time.monotonic()
    yield
    print(f"[took {time.monotonic() - started:.0f} s]", flush=True)


def check_out(out: Path) -> None:
    """Refuse to replace a folder that no demo run made."""
    if out.exists() and not (out / "report.json").is_file():
        raise ValueError(f"--out {out} exists and is not an earlier demo's output: name another folder")


def check_room(settings: Settings, cache: Path) -> None:
    """Refuse what the disks surely cannot hold: the model in the cache, a checkpoint and the export in `out`."""
    from qtarget_megatron.megatron.training import outputs

    float32 = 4 * PARAMETERS
    sizes = {
        # The export, and in the checkpoint each weight with Adam's two moments; of adapters next to nothing.
        "--out": (settings.out.parent, float32 if settings.lora else 4 * float32),
        "--cache": (cache, 0 if (cache / MODEL_FOLDER).is_dir() else float32),
    }
    items = []
    for flag, (folder, nbytes) in sizes.items():
        while not folder.exists():
            folder = folder.parent
        items.append(outputs.Item(flag, folder, nbytes))
    outputs.check_room([item for item in items if item.nbytes])


@contextmanager
def finished_output(out: Path) -> Iterator[Path]:
    """Yield a working folder that becomes `out` only if the block succeeds.

    If it fails, its train.log is kept as `<out>-failed.log`; an earlier `out` stays as it was.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield work
        work.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    except BaseException:
        if (work / "train.log").is_file():
            kept = out.with_name(f"{out.name}-failed.log")
            (work / "train.log").replace(kept)
            print(f"the full log is kept in {kept}", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def parse_arguments(argv: list[str] | None = None) -> tuple[Settings, Path]:
    """Return the run's settings and the cache folder from the command line."""
    default = Settings(out=Path("demo-output"))
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo.run",
        description="Fine-tune a small real model on six CPU ranks and show what changed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=default.out, help="folder for the results")
    parser.add_argument("--cache", type=Path, default=cache_directory(), help="folder for downloads")
    parser.add_argument("--objective", default=default.objective, help="any objective's name")
    parser.add_argument(
        "--objective-args",
        nargs="*",
        metavar="KEY=VALUE",
        default=argparse.SUPPRESS,
        help="its parameters (default: eta=0.5 for target-sft, else none)",
    )
    parser.add_argument("--steps", type=int, default=default.steps, help="training steps")
    parser.add_argument(
        "--lora",
        action="store_true",
        help=f"train adapters of rank {LORA_RANK} instead of all weights; the teacher is the model with its adapters "
        "off, checkpoint/ holds the adapters alone, model/ the model with them merged in",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=argparse.SUPPRESS,
        help=f"peak learning rate (default: {LEARNING_RATE}, with --lora {LORA_LEARNING_RATE})",
    )
    chosen = parser.parse_args(argv)
    if chosen.steps < 1:
        parser.error(f"--steps: expected at least 1, got {chosen.steps}")
    own = {
        "objective_args": default.objective_args if chosen.objective == default.objective else [],
        "learning_rate": LORA_LEARNING_RATE if chosen.lora else LEARNING_RATE,
    }
    given = own | vars(chosen)
    settings = Settings(
        out=chosen.out.resolve(),
        objective=chosen.objective,
        objective_args=given["objective_args"],
        steps=chosen.steps,
        learning_rate=given["learning_rate"],
        lora=chosen.lora,
    )
    return settings, chosen.cache.resolve()


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the process' exit status."""
    settings, cache = parse_arguments(argv)
    # Threads that spin while they wait make transformers crawl on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    started = time.monotonic()
    try:
        with sigterm_as_interrupt():
            run(settings, cache)
    except (ValueError, LaunchFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; every process that was started has ended", file=sys.stderr)
        return 130
    print(f"The demo took {time.monotonic() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
