"""The CPU platform stands in for CUDA where there is none, never where there is some, and changes no result."""

import subprocess
import sys

import pytest
import torch
from launching import REPOSITORY

from qtarget_megatron.megatron.runtime.wheel_repairs import GroupStepAdam

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the platform never activates where CUDA is present")


def python(code, *flags):
    command = [sys.executable, *(flags or ("-W", "ignore")), "-c", code]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=800)


@NO_GPU
def test_importing_the_package_leaves_torch_alone():
    result = python(
        "import torch\n"
        "before = torch.cuda.is_available, torch.cuda.Stream, torch.compile\n"
        "import qtarget_megatron.finetune\n"
        "from qtarget_megatron.megatron.runtime import cpu_platform\n"
        "assert not cpu_platform.is_active()\n"
        "assert before == (torch.cuda.is_available, torch.cuda.Stream, torch.compile)\n"
        "import sys; assert not any(name == 'megatron' or name.startswith('megatron.') for name in sys.modules)\n"
    )
    assert result.returncode == 0, result.stderr


@NO_GPU
def test_activation_says_so_once_and_redirects_cuda_to_the_cpu():
    result = python(
        "from qtarget_megatron.megatron.runtime import cpu_platform\n"
        "assert cpu_platform.activate() and cpu_platform.activate(requested=True) and cpu_platform.is_active()\n"
        "import torch\n"
        "made = [torch.zeros(2, device=d) for d in ('cuda', 'cuda:0', torch.device('cuda'), 0)]\n"
        "made += [torch.ones(2).cuda(), torch.ones(2).to('cuda'), torch.ones(2).to(0), torch.ones(2).pin_memory()]\n"
        "assert all(t.device.type == 'cpu' for t in made)\n"
        "assert torch.ones(1).type() == 'torch.cuda.FloatTensor'\n"
        "assert torch.cuda.is_available() and torch.cuda.current_device() == 0\n"
        "torch.manual_seed(3); a = torch.rand(2); torch.cuda.manual_seed(3); assert torch.equal(a, torch.rand(2))\n"
        "state = torch.cuda.get_rng_state(); a = torch.rand(2)\n"
        "torch.cuda.set_rng_state(state); assert torch.equal(a, torch.rand(2))\n"
        "assert torch.compile(len) is len\n"
        "assert torch.cuda.max_memory_allocated() > 2**20\n"
    )
    assert result.returncode == 0, result.stderr


NOTICE = "no CUDA device, running Megatron on the CPU over gloo"
TWICE = "from qtarget_megatron.megatron.runtime import cpu_platform\ncpu_platform.activate(), cpu_platform.activate()\n"


@NO_GPU
def test_a_script_is_warned_of_the_cpu_once_where_it_asks_for_it():
    result = python(TWICE, "-W", "default")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    # Of the second line: the script's, not the package's.
    assert result.stderr.count(NOTICE) == 1 and f"<string>:2: UserWarning: {NOTICE}" in result.stderr
    silenced = python(TWICE, "-W", f"ignore:{NOTICE}")
    assert (silenced.returncode, silenced.stdout, silenced.stderr) == (0, "", "")
    assert python(TWICE, "-W", f"error:{NOTICE}").returncode == 1
    other_rank = python(f"import os\nos.environ['RANK'] = '1'\n{TWICE}", "-W", "default")
    assert (other_rank.returncode, other_rank.stdout, other_rank.stderr) == (0, "", "")


@NO_GPU
def test_a_script_that_shows_lines_of_the_log_has_the_notice_among_them():
    set_up = (
        "import logging, sys\nlogging.basicConfig(level='INFO', format='%(name)s|%(message)s', stream=sys.stdout)\n"
    )
    result = python(set_up + TWICE, "-W", "default")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"qtarget_megatron|{NOTICE}\n", "")


@NO_GPU
def test_a_backward_function_may_name_cuda_however_backward_is_called():
    result = python(
        "from qtarget_megatron.megatron.runtime import cpu_platform\n"
        "cpu_platform.activate()\n"
        "import torch\n"
        "class Double(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x): return 2 * x\n"
        "    @staticmethod\n"
        "    def backward(ctx, g): return g + torch.ones(3, device='cuda')\n"
        "x = torch.zeros(3, requires_grad=True)\n"
        "Double.apply(x).sum().backward()\n"
        "torch.autograd.backward(Double.apply(x), torch.full((3,), 4.0))\n"
        "Double.apply(x).backward(torch.full((3,), 4.0))\n"
        "Double.apply(x).sum().backward(gradient=torch.tensor(9.0))\n"
        "assert x.grad.tolist() == [2.0 + 5.0 + 5.0 + 10.0] * 3, x.grad\n"
    )
    assert result.returncode == 0, result.stderr


def test_activation_is_refused_where_cuda_is_present():
    result = python(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "from qtarget_megatron.megatron.runtime import cpu_platform\n"
        "assert not cpu_platform.activate() and not cpu_platform.is_active()\n"
        "try: cpu_platform.activate(requested=True)\n"
        "except ValueError as error: assert '--cpu' in str(error)\n"
        "else: raise AssertionError('not refused')\n"
    )
    assert result.returncode == 0, result.stderr


@NO_GPU
def test_activation_after_megatron_is_refused():
    result = python(
        "import sys, types\n"
        "from qtarget_megatron.megatron.runtime import cpu_platform\n"
        "sys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"
        "try: cpu_platform.activate()\n"
        "except RuntimeError as error: assert 'before importing megatron' in str(error)\n"
        "else: raise AssertionError('not refused')\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_the_optimizer_with_a_step_per_group_updates_like_torchs(adam_w_mode):
    generator = torch.Generator().manual_seed(5)
    start = [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(5)]

    def train(make, reload_after=None):
        parameters = [p.clone().requires_grad_() for p in start]
        optimizer = make([{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}])
        for step, grads in enumerate(gradients):
            for parameter, gradient in zip(parameters, grads, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            if step == reload_after:
                state = optimizer.state_dict()
                assert all("step" not in entry for entry in state["state"].values())
                assert [group["step"] for group in state["param_groups"]] == [step + 1] * 2
                optimizer = make([{"params": parameters[:1]}, {"params": parameters[1:]}])
                optimizer.load_state_dict(state)
        return parameters

    torchs = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    expected = train(lambda groups: torchs(groups, lr=0.1, weight_decay=0.2))
    for reload_after in (None, 2):
        found = train(lambda g: GroupStepAdam(g, lr=0.1, weight_decay=0.2, adam_w_mode=adam_w_mode), reload_after)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
