"""What the native kernels refuse, and how the instruction set is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_formulas import IGNORE, ISAS, TEACHER

from qtarget_megatron import _C, kernels
from qtarget_megatron.kernels import native, reference
from qtarget_megatron.statistics import Divergence, StatisticsRequest, VocabularyShard

MIXED = (0.5, 0.5)


def is_available(isa):
    try:
        _C.set_cpu_isa(isa)
    except ValueError:
        return False
    finally:
        _C.set_cpu_isa("auto")
    return True


def skip_without(isa):
    if not is_available(isa):
        pytest.skip(f"this processor or this build has no {isa}")


def run_with(isa, *arguments):
    environment = os.environ | {"QTARGET_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=800)


def call(**changes):
    arguments = dict(residuals=(MIXED,), shard=VocabularyShard(0, 8, IGNORE))
    arguments |= dict(logits=torch.zeros(2, 8), teacher_logits=torch.zeros(2, 8), labels=torch.zeros(2).long())
    arguments |= dict(maxima=torch.zeros(2, 2), scales=torch.ones(3, 2), out=torch.zeros(2, 8))
    native.logit_gradient(**(arguments | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(logits=torch.zeros(2, 8).double()), "logits must be float32"),
        (dict(logits=torch.zeros(2, 8, device="meta")), "logits must be on cpu or cuda"),
        (dict(logits=torch.zeros(2, 2, 8)), r"shape \[N, V_local\]"),
        (dict(logits=torch.zeros(8, 2).T), r"column stride 2: call \.contiguous\(\)"),
        (dict(teacher_logits=None), "expected a tensor, got None"),
        (
            dict(teacher_logits=torch.zeros(2, 7)),
            r"teacher_logits must have shape \(2, 8\), got \(2, 7\)",
        ),
        (dict(teacher_logits=torch.zeros(2, 8).double()), "teacher_logits must be float32"),
        (dict(labels=torch.zeros(2).int()), r"labels must be torch\.int64"),
        (dict(labels=torch.zeros(3).long()), r"shape \(2,\)"),
        (dict(labels=torch.zeros(4).long()[::2]), "labels must be contiguous"),
        (dict(shard=VocabularyShard(0, 9)), r"valid_columns must be in 0\.\.8"),
        (dict(residuals=(MIXED,) * 3), "at most 2 residuals, got 3"),
        (dict(scales=torch.ones(3, 2).double()), r"scales must be torch\.float32"),
        (dict(maxima=torch.ones(2, 4)[:, ::2]), "maxima must be contiguous"),
        (dict(scales=torch.ones(2, 2)), r"scales must be torch\.float32 of shape \(3, 2\)"),
        (dict(out=torch.zeros(2, 8).half()), "out must have the dtype of logits"),
        (dict(out=torch.zeros(1, 8).expand(2, 8)), "rows of out overlap"),
    ],
)
def test_wrong_arguments_are_one_clear_line(changes, message):
    call()
    with pytest.raises(ValueError, match=message) as error:
        call(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kernel", [native, reference])
def test_a_teacher_that_is_read_must_be_there(kernel):
    z, labels, shard = torch.zeros(2, 8), torch.zeros(2).long(), VocabularyShard(0, 8)
    with pytest.raises(ValueError, match="teacher_logits: expected a tensor, got None"):
        kernel.partial_statistics(z, None, labels, request=StatisticsRequest((MIXED,)), shard=shard)
    rows = dict(maxima=torch.zeros(2, 2), scales=torch.ones(3, 2))
    with pytest.raises(ValueError, match="teacher_logits: expected a tensor, got None"):
        kernel.logit_gradient(z, None, labels, residuals=(MIXED,), shard=shard, **rows, out=torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("asked", "dtype", "name"),
    [
        ("auto", torch.bfloat16, "cpp"),
        ("cpp", torch.float32, "cpp"),
        ("auto", torch.float64, "reference"),
        ("reference", torch.float32, "reference"),
    ],
)
def test_a_backend_is_called_what_it_is_asked_for_by(asked, dtype, name):
    assert kernels.name(kernels.choose(asked, "cpu", dtype), "cpu") == name


@pytest.mark.parametrize(
    ("rank", "vocab_size", "shard"),
    [(0, 10, (0, 4)), (2, 10, (8, 2)), (2, 12, (8, 4)), (3, 12, (12, 0)), (3, 10, (12, 0))],
)
def test_padding_is_behind_the_true_vocabulary(rank, vocab_size, shard):
    """Four columns on each rank."""
    assert VocabularyShard.of_rank(rank, 4, vocab_size, ignore_index=7) == (*shard, 7)


def test_in_place_with_another_row_stride_is_refused():
    buffer = torch.zeros(40)
    with pytest.raises(ValueError, match="shares memory with logits"):
        call(logits=buffer.as_strided((2, 8), (8, 1)), out=buffer.as_strided((2, 8), (12, 1)))


def test_a_layout_of_another_width_than_the_output_is_refused():
    z, labels, out = torch.zeros(2, 8), torch.zeros(2).long(), torch.full((2, 40), 7.0)
    logits, teacher, rows, columns, start, threads = (z.data_ptr(), 0, 8), (0, 0, 0), 2, 8, 0, 1
    shard = (logits, teacher, labels.data_ptr(), rows, columns, start, IGNORE, [(1.0, 0.0)])
    every, none = (True, 3, True, True, True, True), (False, -1, False, False, False, False)
    for layout, width in ((every, 13), (none, 6)):
        with pytest.raises(ValueError, match=f"columns, got {width}"):
            _C.cpu_partial_statistics(*shard, layout, width, out.data_ptr(), threads)
    assert (out == 7).all()
    _C.cpu_partial_statistics(*shard, every, 14, out.data_ptr(), threads)
    assert (out.flatten()[:28] != 7).all() and (out.flatten()[28:] == 7).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(residuals=()), "a divergence is taken from one residual, got 0"),
        (dict(residuals=(TEACHER, TEACHER)), "a divergence is taken from one residual, got 2"),
        (dict(maxima=torch.zeros(2, 2)), r"maxima must be torch.float32 of shape \(3, 2\)"),
        (dict(scales=torch.zeros(3, 2)), r"scales must be torch.float32 of shape \(2, 2\)"),
        (dict(teacher_logits=None), "read teacher_logits: expected a tensor, got None"),
    ],
)
def test_a_divergence_of_wrong_parts_is_refused(changes, message):
    arguments = (
        dict(
            logits=torch.zeros(2, 8),
            teacher_logits=torch.zeros(2, 8),
            labels=torch.zeros(2).long(),
            residuals=(TEACHER,),
            divergence=Divergence.total_variation(),
            shard=VocabularyShard(0, 8, IGNORE),
            maxima=torch.zeros(3, 2),
            scales=torch.ones(2, 2),
        )
        | changes
    )
    matrices = [arguments.pop(name) for name in ("logits", "teacher_logits", "labels")]
    with pytest.raises(ValueError, match=message):
        native.divergence_sums(*matrices, **arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Divergence("hellinger"), "a divergence is one of reverse-kl, mixture, total-variation"),
        (lambda: Divergence.mixture(0.0, of_model=1.0), r"a mixture has a share in \(0, 1\)"),
        (lambda: Divergence.mixture(0.5, of_residual=-1.0), "weights of 0 or more"),
        (lambda: StatisticsRequest(divergence=Divergence.reverse_kl()), "from the first residual, got no residuals"),
    ],
)
def test_a_divergence_that_is_none_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("isa", [*ISAS, "sse9"])
def test_environment_chooses_the_instruction_set(isa):
    code = "import torch; from qtarget_megatron import _C; print(_C.cpu_isa())"
    done = run_with(isa, "-c", code)
    if isa == "sse9":
        assert done.returncode != 0
        assert (
            "ValueError: QTARGET_CPU_ISA=sse9: unknown instruction set, expected scalar, avx2 or avx512" in done.stderr
        )
        return
    skip_without(isa)
    assert done.stdout.strip() == isa


def test_the_fastest_instruction_set_is_the_default():
    available = [isa for isa in ISAS if is_available(isa)]
    _C.set_cpu_isa("auto")
    assert _C.cpu_isa() == os.environ.get("QTARGET_CPU_ISA", available[-1])
    assert _C.build_info()["cpu"] == [isa for isa in ISAS if isa in _C.build_info()["cpu"]]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("isa", ISAS[:-1])
def test_every_test_of_the_loss_passes_with_the_slower_instruction_sets(isa):
    skip_without(isa)
    tests = Path(__file__).with_name("test_loss.py")
    done = run_with(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpp", str(tests))
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
