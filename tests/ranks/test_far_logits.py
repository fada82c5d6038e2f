"""Logits far from 0: nothing is rounded by the offset, in any residual, by any backend, over any number of ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from launching import run_ranks
from native_formulas import ISAS, force_isa

from qtarget_megatron import _C, Objective, SparseTeacher, objectives, qtarget_cross_entropy

ROWS, VOCAB = 12, 2500  # more than two of the CPU kernel's blocks
# (a, b): of kd, gem, target-sft, and of objectives that are not there yet.
RESIDUALS = {
    "kd": ((1 / 3, 0.0), (0.0, 1 / 3)),
    "kd at T = 10": ((0.1, 0.0), (0.0, 0.1)),
    "gem": ((1 / 0.7, 0.0),),
    "target-sft": ((0.7, 0.3),),
    "equal parts": ((0.5, 0.5), (0.0, 1.0)),
    "against the student": ((-0.3, 1.1),),
    "against the teacher": ((1.2, -0.4),),
}
# Of the student and of the teacher. Float32 has steps of 2^-12 at 3000: a residual that is not centred before it is
# rounded is off by 1e-4.
OFFSETS = [(0, 0), (300, 300), (3000, 3000), (-3000, -3000), (3000, -2000), (0, 3000), (3000, 0)]
# Float32 sums and exponents, each rounded at the size of the spread: up to 6e-7, by every instruction set here.
# Rounded at the size of 3000 they were 5e-6 to 4e-5 for coefficients that are no powers of two.
BOUND = 2e-6


def objective_of(residuals):
    """Everything that an objective may read of its residuals enters the loss; masses that differ from row to row."""

    def evaluate(stats, inputs):
        loss, masses = stats.weighted_nll(torch.ones_like(stats.p)), []
        for index, residual in enumerate(stats.residuals):
            loss = loss + stats.cross_entropy(index) + residual.entropy - 0.1 * residual.log_p.clamp(min=-50)
            masses.append(0.5 + stats.p)
        return loss, torch.ones_like(stats.p), masses

    return Objective(evaluate, residuals=residuals, residual_entropy=True, residual_label=True)


def truth(residuals, z, t, labels, upstream):
    """Loss and gradient in float64, from the definition."""
    z, t = z.double(), t.double()
    rows = torch.arange(len(labels))
    log_p = z.log_softmax(-1)
    label = torch.zeros_like(z)
    label[rows, labels] = 1
    loss, gradient, p_y = -log_p[rows, labels], log_p.exp() - label, log_p[rows, labels].exp()
    for pair in residuals:
        # A coefficient of 0 removes its operand, -inf too.
        u = sum(c * (x - x.amax(-1, keepdim=True)) for c, x in zip(pair, (z, t), strict=True) if c != 0)
        log_r = u.log_softmax(-1)
        r = log_r.exp()
        loss = loss - torch.where(r == 0, 0, r * log_p + r * log_r).sum(-1) - 0.1 * log_r[rows, labels].clamp(min=-50)
        gradient = gradient + (0.5 + p_y)[:, None] * (log_p.exp() - r)
    return loss, gradient * upstream.double()[:, None]


def draw(offset, seed=0):
    """Logits that float32 holds exactly at any of the offsets, with a few that are far below."""
    generator = torch.Generator().manual_seed(seed)

    def one(centre):
        values = (3 * torch.randn(ROWS, VOCAB, generator=generator) * 64).round() / 64
        values[:, ::97] = -1e4
        values[1, :1100] = -torch.inf
        return values + centre

    z, t = one(offset[0]), one(offset[1])
    # In both alike, so that no residual takes -inf - -inf.
    labels = torch.randint(VOCAB // 2, VOCAB, (ROWS,), generator=generator)
    labels[labels % 97 == 0] += 1
    return z, t, labels, torch.rand(ROWS, generator=generator) + 0.5


def errors(case, offset, backend, group=None, rank=0, ranks=1):
    residuals = RESIDUALS[case]
    z, t, labels, upstream = draw(offset)
    if any(c < 0 for pair in residuals for c in pair):
        z, t = z.clamp(min=offset[0] - 40), t.clamp(min=offset[1] - 40)
    if "student" in case:
        z[:, 5] = offset[0] - 40
    expected_loss, expected = truth(residuals, z, t, labels, upstream)
    shard = slice(rank * VOCAB // ranks, (rank + 1) * VOCAB // ranks)
    leaf = z[:, shard].clone().requires_grad_()
    loss = qtarget_cross_entropy(
        leaf,
        labels,
        objective=objective_of(residuals),
        teacher_logits=t[:, shard],
        backend=backend,
        group=group,
    )
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    of_loss = ((loss.double() - expected_loss).abs() / expected_loss.abs().clamp(min=1)).max().item()
    return of_loss, (gradient.double() - expected[:, shard]).abs().max().item()


BACKENDS = ["reference", *(f"cpp {isa}" for isa in ISAS)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", RESIDUALS)
def test_an_offset_of_the_logits_rounds_nothing(case, backend):
    if backend != "reference":
        force_isa(backend.split()[1])
    try:
        for offset in OFFSETS:
            of_loss, of_gradient = errors(case, offset, backend.split()[0])
            assert of_loss < BOUND and of_gradient < BOUND, (offset, of_loss, of_gradient)
    finally:
        _C.set_cpu_isa("auto")


def on_ranks():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return [
        (case, offset, backend, errors(case, offset, backend, dist.group.WORLD, rank, ranks))
        for case in RESIDUALS
        for offset in OFFSETS
        for backend in ("reference", "cpp")
    ]


@pytest.mark.distributed
def test_an_offset_rounds_nothing_over_two_ranks():
    for found in run_ranks(2, on_ranks, timeout=120):
        for case, offset, backend, worst in found:
            assert max(worst) < BOUND, (case, offset, backend, worst)


@pytest.mark.parametrize("temperature", [3.0, 10.0])
@pytest.mark.parametrize("offset", [300, 3000])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_kd_of_a_model_to_itself_is_0_however_far_its_logits_are(temperature, offset, backend):
    z, _, labels, _ = draw((offset, 0))
    loss = qtarget_cross_entropy(
        z, labels, objective=objectives.kd(temperature=temperature), teacher_logits=z, backend=backend
    )
    # T^2 times what float32 sums of 2,500 terms leave of two equal entropies: 4e-7.
    assert loss.abs().max() < temperature**2 * 1e-6


@pytest.mark.parametrize("rule", ["uniform", "student", "drop"])
@pytest.mark.parametrize("name", ["target-sft", "kd"])
def test_a_sparse_teacher_of_a_student_far_from_0(name, rule):
    """Against the dense teacher that it stands for, in float64 by the reference."""
    z, _, labels, upstream = draw((3000, 0))
    z = z.clamp(min=2900)  # finite, or a teacher that spreads its tail has an infinite loss
    t = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(3)).double().mul(3).log_softmax(-1)
    log_p, ids = t.topk(16)
    # The label is kept in every second row.
    ids[::2, 3] = torch.where((ids[::2] == labels[::2, None]).any(-1), ids[::2, 3], labels[::2])
    tail = 1 - log_p.exp().sum(-1)
    dense = torch.full((ROWS, VOCAB), -math.inf, dtype=torch.float64)
    if rule == "uniform":
        dense[:] = (tail / (VOCAB - 16)).log()[:, None]
    elif rule == "student":
        others = z.double().log_softmax(-1).scatter(-1, ids, -math.inf)
        dense = others - others.logsumexp(-1, keepdim=True) + tail.log()[:, None]
    dense = dense.scatter(-1, ids, log_p)
    objective = objectives.target_sft(eta=0.3) if name == "target-sft" else objectives.kd(temperature=3.0)
    found = []
    for logits, teacher, backend in (
        (z, dict(sparse_teacher=SparseTeacher(ids, log_p.float(), tail.float(), rule)), "cpp"),
        (z.double(), dict(teacher_logits=dense), "reference"),
    ):
        leaf = logits.clone().requires_grad_()
        loss = qtarget_cross_entropy(leaf, labels, objective=objective, backend=backend, **teacher)
        found.append((loss.detach().double(), torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))[0].double()))
    (loss, gradient), (expected_loss, expected) = found
    assert ((loss - expected_loss).abs() / expected_loss.abs().clamp(min=1)).max() < BOUND
    assert (gradient - expected).abs().max() < BOUND
