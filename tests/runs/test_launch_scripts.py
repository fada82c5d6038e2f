"""The scripts in examples/launch, each run as it is on a tiny model: by their environment, over gloo."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from finetune_runs import run_tool, scalars, write_data, write_models
from launching import REPOSITORY, Launch, free_port, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPTS = REPOSITORY / "examples" / "launch"
STEPS = 10
TP2 = ["--tensor-model-parallel-size", 2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    write_models(folder)
    write_data(folder / "train.jsonl", 30, seed=1)
    programs = folder / "bin"
    programs.mkdir()
    # What a cluster has: the same torchrun as the tests', and SLURM's commands for a job on this machine.
    write_program(programs / "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    write_program(programs / "srun", '[[ $1 == --kill-on-bad-exit=1 ]] && shift && exec "$@"')
    write_program(programs / "scontrol", '[[ "$*" == "show hostnames here" ]] && echo localhost')
    return folder


def write_program(path, line):
    path.write_text(f"#!/usr/bin/env bash\n{line}\n")
    path.chmod(0o755)


def environment(workspace, **values):
    """What a script reads, and the same names without the prefix as somebody's environment may hold them."""
    values = dict(MODEL="untied", TEACHER="deep", TRAIN="train.jsonl") | values
    paths = {key: str(workspace / values[key]) for key in values.keys() & PATHS}
    small = dict(GPUS="2", SEQ_LENGTH="32", GLOBAL_BATCH="4", STEPS="2", LR="1e-3", PRECISION="")
    path = f"{workspace / 'bin'}{os.pathsep}{os.environ['PATH']}"
    cluster = {key: str(values.pop(key)) for key in list(values) if key.startswith("SLURM_")}
    given = small | {key: str(value) for key, value in values.items()} | paths
    foreign = dict.fromkeys([*given, *OTHERS], "somebody's")
    return foreign | {f"QTARGET_{key}": value for key, value in given.items()} | cluster | {"PATH": path}


OTHERS = ("TAIL", "TEACHER_TP", "OBJECTIVE_ARGS", "KERNELS", "START", "LORA_RANK")
MODEL_FILES, ADAPTER_FILES = {"config.json", "tokenizer.json"}, {"adapter_config.json"}
PATHS = {"MODEL", "TEACHER", "STUDENT", "TRAIN", "OUT", "CHECKPOINT"}


def run(workspace, script, *flags, **values):
    with Launch(["bash", SCRIPTS / script, *flags], environment(workspace, **values)) as launch:
        done = launch.wait(timeout=180)
    assert_ended_well(done)
    return done.stdout


def assert_ended_well(done):
    errors = [line for line in done.stdout.splitlines() if "error: " in line]
    assert done.returncode == 0, "\n".join(errors) or done.stdout[-4000:]


def assert_exported(folder, expected=MODEL_FILES):
    names = {path.name for path in Path(folder).iterdir()}
    assert expected <= names and any(name.endswith(".safetensors") for name in names)


@pytest.mark.parametrize(("script", "files"), [("one_node.sh", MODEL_FILES), ("lora_70b.sh", ADAPTER_FILES)])
def test_one_node_and_its_second_start(workspace, script, files):
    values = dict(OUT=Path(script).stem, TP=2, STEPS=3)
    run(workspace, script, "--exit-interval", "2", **values)
    assert not (workspace / values["OUT"] / "hf").exists()
    again = run(workspace, script, **values)
    assert "iteration        3/" in again and "iteration        2/" not in again
    assert_exported(workspace / values["OUT"] / "hf", files)


@pytest.fixture(scope="module")
def slurm(workspace):
    job = dict(SLURM_JOB_NODELIST="here", SLURM_JOB_NUM_NODES=1, SLURM_JOB_ID="17", PORT=free_port())
    run(workspace, "slurm.sh", OUT="slurm", TP=2, PP=1, **job)
    return workspace / "slurm"


def test_slurm(slurm):
    assert_exported(slurm / "hf")


def test_experts_shared_by_all_ranks(workspace):
    small = dict(MODEL="experts", TP=2, EP=2, KERNELS="", BALANCE=0.01)
    run(workspace, "mixture_of_experts.sh", OUT="experts-run", **small)
    assert_exported(workspace / "experts-run" / "hf")


def test_cached_teacher_in_two_steps(workspace):
    small = dict(TEACHER="teacher", STUDENT="untied", OUT="cached", KEPT=32, TEACHER_TP=2)
    values = {key: value for key, value in small.items() if key != "TEACHER"}
    with Launch(
        ["bash", SCRIPTS / "cached_teacher.sh"],
        environment(workspace, **values) | {"QTARGET_TEACHER": str(workspace / small["TEACHER"])},
    ) as launch:
        done = launch.wait(timeout=180)
    assert_ended_well(done)
    assert "cache-teacher: 30/30 samples" in done.stdout
    assert_exported(workspace / "cached" / "hf")


def test_from_a_megatron_checkpoint(workspace, slurm):
    """Imported at another layout; the first step finds the same p(y) as a start from the directory."""
    words = ["import", "--hf-model", workspace / "untied", "--save", workspace / "ckpt", *TP2]
    for code, printed in run_ranks(2, run_tool, ("convert_hf", list(map(str, words))), timeout=120, megatron=True):
        assert code == 0, printed[-3000:]
    run(workspace, "from_megatron_checkpoint.sh", CHECKPOINT="ckpt", OUT="continued", TP=1, PP=2, OBJECTIVE="sft")
    first, direct = (scalars(folder / "tensorboard")["p(y)"][0] for folder in (workspace / "continued", slurm))
    assert first == pytest.approx(direct, rel=1e-5)
    assert_exported(workspace / "continued" / "hf")


# ---- two nodes: network namespaces with an address each, joined by a cable


def has_namespaces():
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"qtarget-{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=200).returncode == 0
    if made:
        ip("netns", "del", name)
    return made


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=200)


@pytest.fixture(scope="module")
def nodes():
    """Two (name, address, interface), removed afterwards."""
    if not has_namespaces():
        pytest.skip("network namespaces need root and the command ip")
    tag = uuid.uuid4().hex[:6]
    found = [
        (f"qtarget-{tag}-{side}", f"10.213.47.{number}", f"qt{tag}{side}") for number, side in ((1, "a"), (2, "b"))
    ]
    with contextlib.ExitStack() as stack:
        for name, _, _ in found:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        (a, _, cable_a), (b, _, cable_b) = found
        ip("link", "add", cable_a, "netns", a, "type", "veth", "peer", "name", cable_b, "netns", b)
        for name, address, cable in found:
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield found


@contextlib.contextmanager
def started(workspace, nodes, out):
    """The script on both nodes, one rank each: tensor parallelism between them."""
    values = dict(HEAD=nodes[0][1], PORT=29500, NODES=2, GPUS=1, RUN=uuid.uuid4().hex, OUT=out, TP=1, PP=2, STEPS=STEPS)
    with contextlib.ExitStack() as stack:
        launches = []
        for number, (name, address, cable) in enumerate(nodes):
            # A host has one name here, so that torchrun cannot tell by it which of the nodes is the head.
            node = {"GLOO_SOCKET_IFNAME": cable, "PET_LOCAL_ADDR": address, "PET_RDZV_CONF": f"is_host={not number}"}
            command = ["ip", "netns", "exec", name, "bash", SCRIPTS / "multi_node.sh", "--save-interval", 2]
            launches.append(stack.enter_context(Launch(command, environment(workspace, **values) | node)))
        yield launches


def losses(workspace, out):
    return scalars(workspace / out / "tensorboard")["lm loss"]


def test_two_nodes_and_one_of_them_killed(workspace, nodes):
    """The other one ends as well; started again, both go on from the last checkpoint with the same losses."""
    with started(workspace, nodes, "undisturbed") as launches:
        for done in [launch.wait(timeout=200) for launch in launches]:
            assert_ended_well(done)
    assert_exported(workspace / "undisturbed" / "hf")

    tracker = workspace / "killed" / "checkpoints" / "latest_checkpointed_iteration.txt"
    with started(workspace, nodes, "killed") as (first, second):
        deadline = time.monotonic() + 600
        while not tracker.exists():
            assert first.process.poll() is None and time.monotonic() < deadline, first.output()[-4000:]
            time.sleep(0.02)
        second.kill()
        assert first.wait(timeout=120).returncode != 0
    assert not (workspace / "killed" / "hf").exists()
    reached = int(tracker.read_text())
    assert 0 < reached < STEPS

    with started(workspace, nodes, "killed") as launches:
        for done in [launch.wait(timeout=200) for launch in launches]:
            assert_ended_well(done)
    assert_exported(workspace / "killed" / "hf")
    # Of a step that was done twice TensorBoard keeps the second.
    assert losses(workspace, "killed")[-(STEPS - reached) :] == losses(workspace, "undisturbed")[reached:]
