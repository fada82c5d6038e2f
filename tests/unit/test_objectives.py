"""Every objective against float64 autograd of its definition; identities; registry."""

import math

import pytest
import torch
from loss_definitions import (
    CASES,
    ROUNDED_EXPONENTS,
    Case,
    beyond_log,
    constant,
    kd,
    likelihood,
    truth,
)
from objective_runs import check, draw, run

from qtarget_megatron import objectives, qtarget_cross_entropy

BACKENDS = ["reference", "cpp"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


# ---- definitions


def test_every_objective_has_a_definition_here():
    assert set(objectives.names()) == {case.objective.name for case in CASES.values()}
    assert all(callable(getattr(objectives, name.replace("-", "_"))) for name in objectives.names())


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_loss_and_gradient_are_the_definition(case, dtype, backend):
    check(case, *draw(dtype=dtype), backend)


@every_case
def test_reference_in_float64_is_the_definition_to_1e12(case):
    check(case, *draw(dtype=torch.float64), "reference")


@every_backend
@every_case
def test_peaked_and_flat_rows_are_the_definition(case, backend):
    logits, labels, teacher, upstream = draw(rows=12)
    logits[:4] *= 10
    logits[4:8] *= 1e-3
    # 0.7 z + 0.3 t reaches 128: half a step of float32 there, for each product and for the sum.
    rounding = 3 * 128 * 2**-24 if case.name in ROUNDED_EXPONENTS else 0.0
    check(case, logits, labels, teacher, upstream, backend, rounding)


@every_backend
@pytest.mark.parametrize("temperature", [0.25, 0.7, 3.0, 10.0])
def test_kd_at_other_temperatures_is_the_definition(temperature, backend):
    objective = objectives.kd(temperature=temperature)
    case = Case("kd", objective, kd(temperature), constant(temperature), temperature**2)
    check(case, *draw(), backend)


# ---- identities


@every_backend
@every_case
def test_gradient_rows_sum_to_zero(case, backend):
    logits, labels, teacher, upstream = draw()
    _, gradient = run(case, logits, labels, teacher, upstream, backend=backend)
    # 211 elements with float32 rounding errors of either sign.
    mass = case.mass(logits.double(), labels) * upstream.abs()
    assert (gradient.double().sum(-1).abs() <= 1e-6 * mass).all()
    trained = truth(case, logits, labels, teacher, upstream).gradient.abs().sum(-1) > 0
    assert torch.equal((gradient != 0).any(-1), trained) and trained.any()


@every_backend
def test_target_sft_without_a_teacher_has_the_gradient_of_dft(backend):
    case = CASES["target-sft-eta0"]
    assert not case.objective.needs_teacher
    logits, labels, teacher, _ = draw()
    gradient = run(case, logits, labels, teacher, backend=backend)[1].double()
    dft = run(CASES["dft"], logits, labels, teacher, backend=backend)[1].double()
    # p - (1 - p_y) p is a difference of terms of mass 1, p_y p is not.
    error, size = (gradient - dft).norm(dim=-1), dft.norm(dim=-1)
    assert (error <= 1e-5 * size + 2**-22).all() and (size > 0).all()


@every_backend
@pytest.mark.parametrize(
    ("special", "general"),
    [
        ("sft", objectives.label_smoothing(lam=0)),
        ("sft", objectives.profit(tau=0)),
        ("sft", objectives.beyond_log(alpha=0)),
        ("sft", objectives.sft_kl(lam=0)),
        ("sft", objectives.hybrid_kd(lam=0)),
        ("sft", objectives.focal(gamma=0)),
        ("sft", objectives.poly1(epsilon=0)),
        ("sft", objectives.entropy_mask(threshold=0)),
        ("dft", objectives.asft(lam=0)),
        ("dft", objectives.talr(tau=1)),
        ("kd", objectives.hybrid_kd(lam=1)),
        ("kd", objectives.mixed_kl(alpha=1)),
        ("kd", objectives.jsd(beta=0)),
        ("kd", objectives.skew_kl(alpha=0)),
        ("reverse-kl", objectives.mixed_kl(alpha=0)),
        ("reverse-kl", objectives.jsd(beta=1)),
        ("reverse-kl", objectives.skew_reverse_kl(alpha=0)),
        ("sft", objectives.reverse_kl(lam=0)),
        ("sft", objectives.jsd(lam=0)),
        ("sft", objectives.skew_kl(lam=0)),
        ("sft", objectives.skew_reverse_kl(lam=0)),
        ("sft", objectives.total_variation(lam=0)),
    ],
    ids=lambda value: str(value),
)
def test_a_limit_of_one_objective_is_another(special, general, backend):
    drawn = draw()
    loss, gradient = run(Case("", general, None), *drawn, backend=backend)
    expected = run(CASES[special], *drawn, backend=backend)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-6, atol=0)


@every_backend
@pytest.mark.parametrize(
    ("special", "general"),
    [
        ("dft", objectives.beyond_log(alpha=1)),
        ("sft", objectives.gem(beta=1)),
        ("sft", objectives.beyond_log(alpha=1e-9)),
        ("sft", objectives.gift(beta=40.0)),
    ],
    ids=lambda value: str(value),
)
def test_limits_whose_gradient_is_that_of_another(special, general, backend):
    logits, labels, teacher, upstream = draw()
    _, gradient = run(Case("", general, None), logits, labels, teacher, upstream, backend=backend)
    _, expected = run(CASES[special], logits, labels, teacher, upstream, backend=backend)
    # gem(1) is onehot and softmax(z) with masses 1 and -1; sft's terms are the same to the last place.
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@every_backend
def test_psft_starts_as_sft(backend):
    logits, labels, teacher, _ = draw()
    old = torch.log_softmax(logits.double(), -1).gather(-1, labels[:, None])[:, 0]
    leaf = logits.clone().requires_grad_()
    loss = qtarget_cross_entropy(
        leaf, labels, objective=objectives.psft(refresh=0), token_inputs={"old_log_prob": old}, backend=backend
    )
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(gradient, run(CASES["sft"], logits, labels, teacher, backend=backend)[1])
    torch.testing.assert_close(loss, -torch.ones(24))


def test_psft_stops_at_the_clip_and_where_the_ratio_is_clamped():
    # Ratios 1.2, 1.3, e^-19 and e^-30.
    objective, zeros = objectives.psft(refresh=0), torch.zeros(4, dtype=torch.int64)
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-25.0, 0.0], [-35.0, 0.0]], requires_grad=True)
    log_p = torch.log_softmax(logits.detach(), -1)[:, 0]
    old = log_p - torch.tensor([math.log(1.2), math.log(1.3), -19.0, -30.0])
    loss, statistics = qtarget_cross_entropy(
        logits, zeros, objective=objective, token_inputs={"old_log_prob": old}, return_statistics=True
    )
    expected = torch.tensor([-1.2, -1.28, -math.exp(-19), -math.exp(-20)])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert (statistics.label_mass == 0).tolist() == [False, True, False, True]


@every_backend
def test_beyond_log_below_zero_trusts_unlikely_labels_more(backend):
    case = Case("", objectives.beyond_log(alpha=-0.5), beyond_log(-0.5), lambda z, y: likelihood(z, y) ** -0.5, 2.0)
    check(case, *draw(), backend)


def test_eaft_of_a_flat_row_is_sft_and_of_a_vocabulary_below_k_takes_all_of_it():
    flat = torch.zeros(1, 50)
    loss = qtarget_cross_entropy(flat, torch.tensor([3]), objective=objectives.eaft(k=20))
    torch.testing.assert_close(loss, torch.tensor([math.log(50)]))
    small = torch.zeros(1, 5)
    loss = qtarget_cross_entropy(small, torch.tensor([3]), objective=objectives.eaft(k=20))
    torch.testing.assert_close(loss, torch.tensor([math.log(5) / math.log(20) * math.log(5)]))


def test_cft_counts_all_tokens_or_the_critical_ones():
    supervised, critical = torch.tensor([True, True, True, False]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    inputs = {"critical": critical}
    assert objectives.cft().num_tokens(supervised, inputs, critical) == 3
    assert objectives.cft(denominator="critical").num_tokens(supervised, inputs, critical) == 2


@pytest.mark.parametrize(
    ("name", "parameters", "mask"),
    [
        ("profit", {"tau": 0.1}, lambda log_p, y: log_p.gather(-1, y[:, None])[:, 0].exp() >= 0.1),
        ("entropy-mask", {"threshold": 2.0}, lambda log_p, y: -(log_p.exp() * log_p).sum(-1) >= 2.0),
        ("entropy-mask", {"threshold": 2.0, "keep": "low"}, lambda log_p, y: -(log_p.exp() * log_p).sum(-1) < 2.0),
    ],
    ids=["profit", "entropy-mask", "entropy-mask-low"],
)
@every_backend
def test_a_mask_is_divided_by_all_tokens_or_by_the_kept_ones(name, parameters, mask, backend):
    logits, labels, _, _ = draw()
    labels[1] = -100
    supervised = labels != -100
    kept = mask(torch.log_softmax(logits.double(), -1), labels.clamp(min=0)) & supervised
    assert 0 < kept.sum() < supervised.sum()
    for denominator, expected in (("all", supervised.sum()), ("kept", kept.sum())):
        objective = objectives.get(name, **parameters, denominator=denominator)
        _, statistics = qtarget_cross_entropy(
            logits, labels, objective=objective, backend=backend, return_statistics=True
        )
        assert objective.num_tokens(supervised, {}, statistics.label_mass) == expected


@pytest.mark.parametrize(("name", "other"), [("profit", "kept"), ("entropy-mask", "kept"), ("cft", "critical")])
def test_a_denominator_that_is_none_is_refused(name, other):
    parameters = {"threshold": 1.0} if name == "entropy-mask" else {}
    with pytest.raises(ValueError, match=f"denominator must be 'all' or '{other}', got 'keep'"):
        objectives.get(name, **parameters, denominator="keep")


@pytest.mark.parametrize(
    ("objective", "inputs", "expected"),
    [
        (objectives.weighted_sft(), {"weight": 1.0}, 1.0),
        (objectives.weighted_sft(), {"weight": 0.5}, 0.5),
        (objectives.cft(), {"critical": 1.0}, 1.0),
        (objectives.cft(), {"critical": 0.0}, 0.0),
        (objectives.psft(refresh=0), {"old_log_prob": -1.0}, None),
        (objectives.dft(), {}, None),
        (objectives.target_sft(), {}, None),
    ],
    ids=str,
)
def test_constant_inputs_that_leave_nothing_but_sft_are_known(objective, inputs, expected):
    assert objectives.multiple_of_sft(objective, inputs) == expected
    if expected is not None:
        logits, labels, _, upstream = draw()
        given = {name: torch.full(labels.shape, value) for name, value in inputs.items()}
        found = [
            torch.autograd.grad(qtarget_cross_entropy(leaf, labels, objective=o, token_inputs=given), leaf, upstream)[0]
            for o, leaf in ((o, logits.clone().requires_grad_()) for o in (objective, objectives.sft()))
        ]
        torch.testing.assert_close(found[0], expected * found[1])


@every_backend
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_kd_from_the_student_itself_has_no_gradient(temperature, backend):
    logits, labels, _, upstream = draw()
    case = Case("", objectives.kd(temperature=temperature), None)
    loss, gradient = run(case, logits, labels, logits, upstream, backend=backend)
    # Equal terms cancel; the loss is the difference of two entropies of about 5 nats, times T^2.
    assert gradient.abs().max() <= 1e-7 * upstream.abs().max()
    assert loss.abs().max() <= 1e-5


@every_backend
def test_target_sft_at_eta_1_pulls_towards_the_plain_teacher(backend):
    logits, labels, teacher, _ = draw()
    gradient = run(CASES["target-sft-eta1"], logits, labels, teacher, backend=backend)[1].double()
    p, q = torch.softmax(logits.double(), -1), torch.softmax(teacher.double(), -1)
    rows = torch.arange(len(labels))
    p_y = p[rows, labels]
    residual = p - gradient
    residual[rows, labels] -= p_y
    torch.testing.assert_close(residual, (1 - p_y)[:, None] * q, rtol=0, atol=1e-6)


@every_backend
def test_kd_at_a_temperature_is_kd_of_scaled_logits(backend):
    logits, labels, teacher, _ = draw()
    loss, gradient = run(CASES["kd-T2"], logits, labels, teacher, backend=backend)
    half_loss, half_gradient = run(CASES["kd"], logits / 2, labels, teacher / 2, backend=backend)
    # T^2 KL of the halved logits; the chain rule leaves T^2 / T = T of the gradient.
    torch.testing.assert_close(loss, 4 * half_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, 2 * half_gradient, rtol=1e-4, atol=1e-7)


@every_backend
def test_dft_weight_is_detached(backend):
    # A differentiated -p log p would change the sign of its gradient at p = 1/e.
    logits = torch.tensor([[0.0, -3.0], [0.0, 3.0]])
    _, gradient = run(CASES["dft"], logits, torch.tensor([0, 0]), logits, backend=backend)
    assert (gradient[:, 0] < 0).all() and (gradient[:, 1] > 0).all()


# ---- extreme logits


@every_backend
@pytest.mark.parametrize("offset", [1e4, -1e4])
@every_case
def test_large_offsets_cost_no_more_than_the_rounding_of_the_logits(case, offset, backend):
    logits, labels, teacher, upstream = draw()
    # Exactly representable at 1e4, where float32 has steps of 2^-10.
    logits = (logits * 128).round() / 128 + offset
    teacher = (teacher * 128).round() / 128 - offset
    # 0.7 z + 0.3 t: half a step of float32, at up to 1e4, for each product and for the sum.
    # Multiplication by 1 or 1/2 is exact.
    rounding = 3 * 1e4 * 2**-24 if case.name in ROUNDED_EXPONENTS else 0.0
    check(case, logits, labels, teacher, upstream, backend, rounding)


@every_backend
@every_case
def test_labels_down_to_e_to_the_minus_80_keep_their_precision(case, backend):
    logits, _, teacher, upstream = draw(rows=5)
    labels = torch.tensor([0, 3, 100, 209, 210])
    top = torch.logsumexp(logits, -1)
    logits[torch.arange(5), labels] = top - torch.tensor([10.0, 30.0, 50.0, 70.0, 80.0])
    loss, gradient = check(case, logits, labels, teacher, upstream, backend)
    expected = truth(case, logits, labels, teacher, upstream).gradient
    assert loss.isfinite().all()
    # Between the two it is below what float32 holds, as e^-160 is.
    moved = (gradient != 0).any(-1)
    assert moved[(expected.abs() > 2.0**-126).any(-1)].all() and not moved[(expected == 0).all(-1)].any()


@every_backend
@every_case
def test_logits_of_minus_infinity_have_no_mass(case, backend):
    logits, _, teacher, upstream = draw(rows=6)
    logits[:, 20:60] = -torch.inf
    logits[0, :100] = -torch.inf
    teacher[:, 20:60] = -torch.inf
    teacher[1, :100] = -torch.inf
    labels = torch.tensor([150, 0, 100, 110, 210, 160])
    if case.name == "label-smoothing":
        # The uniform target keeps mass where p is 0: the loss is infinite, the gradient is not.
        loss, gradient = run(case, logits, labels, teacher, upstream, backend=backend)
        assert (loss == torch.inf).all()
        expected = torch.softmax(logits.double(), -1) - 0.1 / 211
        expected[torch.arange(6), labels] -= 0.9
        expected *= upstream[:, None]
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)
        return
    divergence = case.objective.divergence
    finite = torch.ones(6, dtype=torch.bool)
    reads_label_alone = case.objective.name in ("iw-sft", "psft", "pear")  # of the teacher
    if any(a == 0 for a, _ in case.objective.residuals) and (divergence is None or case.name == "mixed-kl"):
        finite[0] = reads_label_alone  # the teacher has mass where the student has none
    if divergence is not None and divergence.kind == "reverse-kl":
        finite[1] = False  # the student has mass where the teacher has none
    loss, gradient = run(case, logits, labels, teacher, upstream, backend=backend)
    assert (loss[~finite] == torch.inf).all() and gradient[finite].isfinite().all()
    if divergence is None:
        assert gradient.isfinite().all()
    logits, labels, teacher, upstream = logits[finite], labels[finite], teacher[finite], upstream[finite]
    loss, gradient = check(case, logits, labels, teacher, upstream, backend)
    assert loss.isfinite().all()
    assert (gradient[:, 20:60] == 0).all()


@every_backend
@pytest.mark.parametrize(("name", "expected"), [("sft", torch.inf), ("dft", 0.0)])
def test_a_label_of_probability_zero(name, expected, backend):
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    loss, gradient = run(CASES[name], logits, torch.tensor([1]), logits, backend=backend)
    assert loss.item() == expected
    p = torch.softmax(logits, -1)
    weighted = p - torch.tensor([[0.0, 1.0, 0.0]]) if name == "sft" else torch.zeros(1, 3)
    torch.testing.assert_close(gradient, weighted)


@every_backend
@every_case
def test_a_certain_label_gives_a_finite_result(case, backend):
    logits, _, teacher, upstream = draw(rows=4)
    labels = torch.tensor([0, 1, 2, 3])
    logits[torch.arange(4), labels] = 200.0
    loss, gradient = check(case, logits, labels, teacher, upstream, backend)
    assert loss.isfinite().all() and gradient.isfinite().all()
