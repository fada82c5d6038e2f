"""One thread per process, reproducible draws, and nothing written next to the sources."""

import os

# Before torch loads its OpenMP runtime. Ranks are processes: more threads would fight over cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# derandomize: the same examples on every run; no database folder; shared machines miss deadlines.
hypothesis.settings.register_profile("repo", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repo")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
