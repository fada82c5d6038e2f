"""The conversion tool, started as a user starts it."""

import subprocess
import sys

import pytest
from checkpoint_models import assert_same_bits
from conversion_runs import read_tensors
from finetune_runs import write_models
from launching import REPOSITORY, run_torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TP2 = ["--tensor-model-parallel-size", 2]


def test_the_tool_runs_by_its_path_and_under_torchrun(tmp_path):
    write_models(tmp_path)
    source, ckpt, out = ["--hf-model", tmp_path / "tied"], tmp_path / "ckpt", tmp_path / "out"
    tool = [sys.executable, REPOSITORY / "tools" / "convert_hf.py"]
    done = subprocess.run(
        list(map(str, [*tool, "import", *source, "--save", ckpt])),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (ckpt / "latest_checkpointed_iteration.txt").read_text() == "release"
    words = ["qtarget_megatron.export", *source, "--load", ckpt, "--save-hf", out, *TP2]
    done = run_torchrun(2, list(map(str, words)), timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("export: exported") == 1
    assert_same_bits(read_tensors(out), read_tensors(tmp_path / "tied"))
