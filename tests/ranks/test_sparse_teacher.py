"""A second model known by its largest probabilities: each tail rule is its formula, all kept is the model itself."""

import math

import pytest
import torch
import torch.distributed as dist
from launching import run_ranks
from loss_definitions import CASES, sample_ids, target_sft

from qtarget_megatron import SparseTeacher, objectives, qtarget_cross_entropy, qtarget_linear_cross_entropy

ROWS, VOCAB, WIDTH, KEPT = 20, 157, 12, 9
RULES = ("uniform", "student", "drop")
WITH_TEACHER = [name for name, case in CASES.items() if case.objective.needs_teacher]
# The reverse KL from a model without mass outside of the kept entries is infinite.
SERVED = [
    (name, rule)
    for name in WITH_TEACHER
    for rule in RULES
    if not (rule == "drop" and CASES[name].objective.request.reverse_cross)
]
every_rule = pytest.mark.parametrize("rule", RULES)
every_case_and_rule = pytest.mark.parametrize(("name", "rule"), SERVED)
# A sum of float32 numbers, as everywhere, and the kept entries taken out of it or put beside it.
FLOAT32 = dict(rtol=2e-5, atol=2e-6)


def draw(seed=0, rows=ROWS, vocab=VOCAB, dtype=torch.float32):
    """hidden, weight, labels (a quarter ignored), teacher logits, upstream. Half of the labels are likely tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(vocab, WIDTH, generator=generator).to(dtype)
    logits = hidden @ weight.t()
    teacher = 0.4 * logits + 2 * torch.randn(rows, vocab, generator=generator).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[::2] = logits[::2].argmax(-1)
    labels[::4] = -100
    return hidden, weight, labels, teacher, torch.randn(rows, generator=generator).to(dtype)


def sparse(teacher, kept, rule, uneven=False):
    log_p = torch.log_softmax(teacher.double(), -1)
    values, ids = log_p.topk(kept, dim=-1)
    if uneven:  # as top-p leaves them
        unused = torch.arange(kept) >= 1 + torch.arange(len(ids))[:, None] % kept
        ids, values = ids.masked_fill(unused, -1), values.masked_fill(unused, math.nan)
    tail = 1 - values.exp().nan_to_num().sum(-1)
    return SparseTeacher(ids, values.to(teacher.dtype), tail.clamp_min(0).to(teacher.dtype), rule)


def expanded(z, teacher):
    """The log-probabilities [N, V] that the rule stands for, written out in float64."""
    vocab = z.shape[-1]
    kept = torch.zeros(z.shape, dtype=torch.bool)
    t = torch.full(z.shape, -math.inf, dtype=torch.float64)
    for row, (ids, values) in enumerate(zip(teacher.ids.tolist(), teacher.log_p.double().tolist(), strict=True)):
        for index, value in zip(ids, values, strict=True):
            if index >= 0:
                kept[row, index], t[row, index] = True, value
    log_tail = teacher.tail.double().log()[:, None]
    if teacher.rule == "uniform":
        elsewhere = log_tail - (vocab - kept.sum(-1, keepdim=True)).double().log()
    elif teacher.rule == "student":
        others = torch.softmax(z.masked_fill(kept, -math.inf), -1)
        elsewhere = log_tail + others.log()
    else:
        elsewhere = torch.tensor(-math.inf, dtype=torch.float64)
    return torch.where(kept, t, elsewhere.expand_as(t))


def expected(name, hidden, weight, labels, teacher, upstream):
    """Loss, dHidden, dWeight by autograd of the definition, with the expanded teacher in place of logits."""
    case = CASES[name]
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    rows = labels != -100
    z = hidden @ weight.t()
    t = expanded(z.detach(), teacher)
    losses = case.definition(z[rows], labels[rows], t[rows], {"sample": sample_ids(labels)[rows]})
    losses.backward(upstream.double()[rows])
    loss = torch.zeros(len(labels), dtype=torch.float64)
    loss[rows] = losses.detach()
    return loss, hidden.grad, weight.grad


def run(name, hidden, weight, labels, teacher, upstream, fused=True, **keywords):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    case = CASES[name]
    keywords |= dict(objective=case.objective, sparse_teacher=teacher, samples=case.samples(labels))
    if fused:
        loss = qtarget_linear_cross_entropy(hidden, weight, labels, chunk_size=7, **keywords)
    else:
        loss = qtarget_cross_entropy(hidden @ weight.t(), labels, **keywords)
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), hidden.grad, weight.grad


def assert_close(found, wanted, **tolerance):
    for part, a, b in zip(("loss", "dHidden", "dWeight"), found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **tolerance, msg=lambda m, p=part: f"{p}: {m}")


@every_case_and_rule
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_float64_is_the_rules_formula(name, rule, fused):
    hidden, weight, labels, teacher, upstream = draw(dtype=torch.float64)
    known = sparse(teacher, KEPT, rule, uneven=True)
    found = run(name, hidden, weight, labels, known, upstream, fused)
    assert_close(found, expected(name, hidden, weight, labels, known, upstream), rtol=1e-9, atol=1e-9)


@every_case_and_rule
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_float32_is_the_rules_formula(name, rule, backend):
    hidden, weight, labels, teacher, upstream = draw(seed=1)
    known = sparse(teacher, KEPT, rule)
    found = run(name, hidden, weight, labels, known, upstream, fused=False, backend=backend)
    assert_close(found, expected(name, hidden, weight, labels, known, upstream), **FLOAT32)


@every_case_and_rule
def test_all_kept_is_the_dense_teacher(name, rule):
    hidden, weight, labels, teacher, upstream = draw(seed=2)
    known = sparse(teacher, VOCAB, rule)
    known = SparseTeacher(known.ids, known.log_p, torch.zeros_like(known.tail), rule)
    found = run(name, hidden, weight, labels, known, upstream, fused=False)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = qtarget_cross_entropy(
        leaves[0] @ leaves[1].t(),
        labels,
        objective=CASES[name].objective,
        teacher_logits=teacher,
        samples=CASES[name].samples(labels),
    )
    loss.backward(upstream)
    assert_close(found, (loss.detach(), leaves[0].grad, leaves[1].grad), **FLOAT32)


@every_rule
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("name", ["target_sft", "kd"])
def test_64_kept_tokens_are_as_near_to_the_model_as_documented(name, rule, spread):
    generator = torch.Generator().manual_seed(5)
    z, t = (torch.randn(40, 5003, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    labels = torch.randint(5003, (40,), generator=generator)
    objective = {"target_sft": objectives.target_sft(eta=1.0), "kd": objectives.kd()}[name]

    def run_with(**teacher):
        leaf = z.clone().requires_grad_()
        loss, stats = qtarget_cross_entropy(leaf, labels, objective=objective, return_statistics=True, **teacher)
        loss.sum().backward()
        return loss.detach(), leaf.grad, stats.residual_mass

    known = sparse(t, 64, rule)
    (loss, gradient, _), (exact, exact_gradient, mass) = run_with(sparse_teacher=known), run_with(teacher_logits=t)
    bound = mass * known.tail
    assert (0.05 < known.tail).all() if spread == 1 else (known.tail < 0.5).any()
    off = (loss - exact).abs()
    assert (off <= bound * (z.amax(-1) - z.amin(-1)) + 1e-12).all() and off.max() > 1e-6
    assert ((gradient - exact_gradient).abs().sum(-1) <= 2 * bound + 1e-12).all()


@every_rule
def test_a_confident_student_outside_of_the_tail_keeps_its_precision(rule):
    """p of all kept tokens is 1 - 1e-9: what is left for the tail is no difference of sums."""
    hidden, weight, labels, teacher, upstream = draw(seed=3)
    logits = (hidden @ weight.t()) * 0.1
    known = sparse(teacher, KEPT, rule)
    logits.scatter_add_(1, known.ids, torch.full(known.ids.shape, 25.0))
    leaf = logits.clone().requires_grad_()
    loss = qtarget_cross_entropy(leaf, labels, objective=objectives.target_sft(eta=0.5), sparse_teacher=known)
    loss.backward(upstream)
    z = logits.double().requires_grad_()
    rows = labels != -100
    target_sft(0.5)(z[rows], labels[rows], expanded(z.detach(), known)[rows], {}).backward(upstream.double()[rows])
    error = (leaf.grad.double() - z.grad).norm(dim=-1)
    assert (error <= 1e-5 * z.grad.norm(dim=-1) + 2e-6 * upstream.abs()).all()


def test_a_label_among_the_kept_and_in_the_tail_both_count():
    hidden, weight, labels, teacher, upstream = draw(seed=4)
    known = sparse(teacher, KEPT, "uniform")
    kept = (known.ids == labels[:, None]).any(-1)
    assert kept[labels != -100].any() and not kept[labels != -100].all()


def test_the_callers_logits_stay_as_they_are():
    hidden, weight, labels, teacher, _ = draw()
    logits = (hidden @ weight.t()).requires_grad_()
    before, version = logits.detach().clone(), logits._version
    for rule in RULES:
        known = sparse(teacher, KEPT, rule)
        qtarget_cross_entropy(logits, labels, objective=objectives.kd(), sparse_teacher=known).sum().backward()
    assert torch.equal(logits.detach(), before) and logits._version == version


def test_16_bits_and_ignored_tokens_with_anything_in_them():
    hidden, weight, labels, teacher, upstream = draw()
    known = sparse(teacher, KEPT, "student")
    known.log_p[labels == -100], known.tail[labels == -100] = math.nan, math.nan
    half = SparseTeacher(known.ids, known.log_p.half(), known.tail, "student")
    found = run("target-sft", hidden.bfloat16(), weight.bfloat16(), labels, half, upstream)
    assert all(tensor.isfinite().all() for tensor in found)
    assert (found[0][labels == -100] == 0).all() and (found[1][labels == -100] == 0).all()


IDS, LABELS, LOGITS = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1]), torch.zeros(2, 5)
GOOD = dict(ids=IDS, log_p=torch.zeros(2, 2), tail=torch.zeros(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rule="even"), "tail rule must be one of uniform, student, drop, got 'even'"),
        (dict(ids=IDS.int()), "int64 ids and log_p and tail in float32.*got torch.int32"),
        (dict(tail=torch.zeros(3)), r"ids \[\.\.\., K\].*got \[2, 2\], \[2, 2\] and \[3\]"),
    ],
)
def test_wrong_parts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SparseTeacher(**(GOOD | changes))


def test_the_reverse_kl_of_a_model_without_a_tail_is_refused():
    teacher = SparseTeacher(**GOOD, rule="drop")
    for objective in (objectives.reverse_kl(), objectives.mixed_kl(), objectives.jsd(beta=1)):
        with pytest.raises(ValueError, match="the reverse KL is infinite where the second model has no mass"):
            qtarget_cross_entropy(LOGITS, LABELS, objective=objective, sparse_teacher=teacher)


@pytest.mark.parametrize("rule", ["uniform", "student"])
def test_a_tail_that_rounding_has_made_0_leaves_the_reverse_kl_finite(rule):
    hidden, weight, labels, teacher, upstream = draw(seed=6)
    known = sparse(teacher, KEPT, rule)
    none, rounding = (
        SparseTeacher(known.ids, known.log_p, torch.full_like(known.tail, tail), rule) for tail in (0.0, 2**-24)
    )
    found = run("reverse-kl", hidden, weight, labels, none, upstream)
    assert all(part.isfinite().all() for part in found)
    assert_close(found, run("reverse-kl", hidden, weight, labels, rounding, upstream), rtol=0, atol=0)


def test_a_wrong_use_is_refused():
    teacher = SparseTeacher(**GOOD)
    kd = objectives.kd()
    with pytest.raises(ValueError, match="either teacher_logits or sparse_teacher, got both"):
        qtarget_cross_entropy(LOGITS, LABELS, objective=kd, teacher_logits=LOGITS, sparse_teacher=teacher)
    with pytest.raises(ValueError, match=r"sparse_teacher must be of \[1\] tokens on cpu like labels, got \[2\]"):
        qtarget_cross_entropy(LOGITS[:1], LABELS[:1], objective=kd, sparse_teacher=teacher)
    with pytest.raises(ValueError, match="needs a second model: pass teacher_logits, or sparse_teacher"):
        qtarget_cross_entropy(LOGITS, LABELS, objective=kd)


def differences_on_ranks(served):
    """Largest differences of loss, dHidden and dWeight from one process, by objective and rule."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    columns, outcomes = 41, {}
    for name, rule in served:
        hidden, weight, labels, teacher, upstream = draw(seed=5, vocab=ranks * columns)
        vocab_size = ranks * columns - 50
        labels[labels >= vocab_size] = 3
        known = sparse(teacher[:, :vocab_size], KEPT, rule, uneven=True)
        whole = run(name, hidden, weight, labels, known, upstream, vocab_size=vocab_size)
        shard = slice(rank * columns, (rank + 1) * columns)
        found = run(name, hidden, weight[shard], labels, known, upstream, vocab_size=vocab_size, group=dist.group.WORLD)
        wanted = whole[0], whole[1], whole[2][shard]
        outcomes[f"{name} {rule}"] = [
            ((a - b).abs() / (1 + b.abs())).max().item() for a, b in zip(found, wanted, strict=True)
        ]
    return outcomes


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_is_unsharded(world_size):
    for rank, outcomes in enumerate(run_ranks(world_size, differences_on_ranks, [SERVED], timeout=180)):
        for name, differences in outcomes.items():
            assert max(differences) < 2e-5, f"{name} on rank {rank}: loss, dHidden, dWeight {differences}"
