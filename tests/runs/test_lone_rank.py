"""One process needs no launcher: resuming, and the examples. The commands of the docs: test_docs_commands.py."""

import re
import socket

import pytest
import torch
from finetune_runs import vocabulary, write_data, write_model
from launching import run_alone
from pretrain_flags import FLAGS

from qtarget_megatron.megatron.runtime import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    shape = dict(hidden_size=64, intermediate_size=64, num_attention_heads=8, max_position_embeddings=4096)
    size = dict(vocab_size=vocabulary(), num_hidden_layers=4)
    write_model(folder / "DIR", "Llama", shape | size, torch.Generator().manual_seed(5))
    write_data(folder / "train.jsonl", 20, seed=3)
    return folder


def test_it_saves_resumes_and_exports(workspace, tmp_path):
    """Half of the variables of a launcher, the addresses of nobody: a lone rank asks for none of them."""
    words = ["qtarget_megatron.finetune", "--hf-model", workspace / "DIR", "--sft-train", workspace / "train.jsonl"]
    words += ["--seq-length", 32, "--micro-batch-size", 1, "--global-batch-size", 2, "--train-iters", 4, "--lr", 1e-3]
    words += ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable", "--async-save", "--log-interval", 1]
    words += ["--save", tmp_path / "saved", "--load", tmp_path / "saved", "--save-hf", tmp_path / "hf"]
    done = run_alone([*words, "--exit-interval", 2], timeout=300, folder=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert not (tmp_path / "hf").exists()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        half = dict(WORLD_SIZE="1", MASTER_ADDR="nowhere.invalid", MASTER_PORT=str(taken.getsockname()[1]))
        done = run_alone(words, timeout=300, folder=tmp_path, env=half)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.findall(r"iteration +(\d+)/", done.stdout) == ["3", "4"]
    assert (tmp_path / "hf" / "config.json").exists()


def test_the_examples(tmp_path):
    done = run_alone(["examples.plugging_in.core_loop", "--steps", 2], timeout=300, folder=tmp_path)
    assert done.returncode == 0 and "step   2  loss" in done.stdout, done.stdout[-3000:]
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "WORLD_SIZE": "1", "MASTER_PORT": "1"}
    done = run_alone(["examples.plugging_in.pretrain_script", *FLAGS], timeout=300, folder=tmp_path, env=env)
    assert done.returncode == 0 and "iteration        4/" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "x"}, None),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, None),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set: start with torchrun, or unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": ""}, "but MASTER_PORT is not set"),
        ({"RANK": "3"}, "RANK is 3, WORLD_SIZE 1: start with torchrun, or unset RANK"),
        ({"RANK": ""}, "RANK must be a number from 0 on, got ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a number from 1 on, got '0'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a number from 0 on, got '-1'"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS says that 8 processes were started, but WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE says that 2 processes were started"),
        ({"SLURM_STEP_NUM_TASKS": "8", "WORLD_SIZE": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_half_an_environment_is_named(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if message is None:
        launch.check_launcher()
        return
    if "MASTER_" in message:
        launch.check_launcher(meets=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        launch.check_launcher()
