"""qtarget_cross_entropy: shapes, padding, masks, bad values, memory, statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_definitions import CASES, RANDOM_CASES, assert_close_to_truth, truth

from qtarget_megatron import Objective, qtarget_cross_entropy

BACKENDS = ["reference", "cpp"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# One without a residual, with one that reads only the student, with two, and with both models.
TYPICAL = {name: CASES[name] for name in ("sft", "label-smoothing", "kd-T2", "target-sft")}
typical_case = pytest.mark.parametrize("case", TYPICAL.values(), ids=TYPICAL)


def draw(shape=(6,), columns=37, dtype=torch.float32):
    """Logits, labels, teacher, upstream gradient."""
    logits = (2 * torch.randn(*shape, columns)).to(dtype)
    teacher = (2 * torch.randn(*shape, columns)).to(dtype)
    return logits, torch.randint(columns, shape), teacher, torch.randn(shape)


def call(case, logits, labels, teacher, **keywords):
    return qtarget_cross_entropy(
        logits,
        labels,
        objective=case.objective,
        teacher_logits=case.teacher(teacher),
        token_inputs=case.inputs(logits, labels, keywords.get("vocab_size")),
        **({"samples": case.samples(labels)} | keywords),
    )


def run(case, logits, labels, teacher, upstream, **keywords):
    """Loss and logit gradient."""
    leaf = logits.detach().requires_grad_()
    loss = call(case, leaf, labels, teacher, **keywords)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    return loss.detach(), gradient


# ---- shapes, layouts, dtypes


@every_backend
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (2, 1, 4), (0,), (3, 0)], ids=str)
@typical_case
def test_any_leading_dimensions(case, shape, backend):
    logits, labels, teacher, upstream = draw(shape)
    loss, gradient = run(case, logits, labels, teacher, upstream, backend=backend)
    assert loss.shape == labels.shape and gradient.shape == logits.shape
    expected = truth(case, logits, labels, teacher, upstream)
    assert_close_to_truth(loss, gradient, expected)


@every_backend
@every_case
def test_a_vocabulary_of_one_token_has_nothing_to_learn(case, backend):
    logits, labels, teacher, upstream = draw((4,), columns=1)
    loss, gradient = run(case, logits, labels, teacher, upstream, backend=backend)
    expected = truth(case, logits, labels, teacher, upstream)
    assert (expected.gradient.abs() < 1e-15).all()
    assert_close_to_truth(loss, gradient, expected)


@every_backend
@typical_case
def test_rows_and_columns_of_any_stride(case, backend):
    logits, labels, teacher, upstream = draw((6, 4))
    expected = run(case, logits, labels, teacher, upstream, backend=backend)
    wide = torch.full((6, 4, 50), torch.nan)
    wide[..., 7:44] = logits
    variants = {
        "transposed rows": (logits.transpose(0, 1).contiguous().transpose(0, 1), labels, teacher),
        "columns apart": (logits.mT.contiguous().mT, labels, teacher.mT.contiguous().mT),
        "a slice": (wide[..., 7:44], labels.T.contiguous().T, teacher),
        "repeated rows": (logits[:1].expand(6, 4, 37), labels[:1].expand(6, 4), teacher[:1]),
    }
    for name, (z, y, t) in variants.items():
        t = t.expand(6, 4, 37)
        assert not z.is_contiguous()
        loss, gradient = run(case, z, y, t, upstream, backend=backend)
        if name == "repeated rows":
            again = run(case, z.contiguous(), y.contiguous(), t, upstream, backend=backend)
            assert torch.equal(loss, again[0]) and torch.equal(gradient, again[1]), name
        else:
            assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loss_is_float32_or_float64_and_the_gradient_has_the_logits_dtype(dtype):
    loss, gradient = run(CASES["sft"], *draw(dtype=dtype))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype


@every_backend
def test_teacher_may_have_another_dtype(backend):
    case = CASES["target-sft"]
    logits, labels, teacher, upstream = draw()
    teacher = teacher.bfloat16()
    loss, gradient = run(case, logits, labels, teacher, upstream, backend=backend)
    expected = truth(case, logits, labels, teacher, upstream)
    assert_close_to_truth(loss, gradient, expected)


def test_auto_takes_the_native_kernels_and_the_reference_for_float64():
    logits, labels, teacher, upstream = draw((40,), columns=501)
    case = CASES["target-sft"]
    results = {b: run(case, logits, labels, teacher, upstream, backend=b) for b in BACKENDS}
    auto = run(case, logits, labels, teacher, upstream)
    assert torch.equal(auto[1], results["cpp"][1])
    # The two backends do differ in the last place, or the line above would prove nothing.
    assert not torch.equal(results["cpp"][1], results["reference"][1])
    double = run(case, logits.double(), labels, teacher.double(), upstream)
    expected = truth(case, logits, labels, teacher, upstream)
    assert_close_to_truth(*double, expected)


# ---- padding


@every_backend
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 3e38])
@every_case
def test_padding_columns_have_no_mass_and_no_gradient(case, junk, backend):
    logits, labels, teacher, upstream = draw(columns=29)
    expected = truth(case, logits, labels, teacher, upstream)
    padding = torch.full((6, 8), junk)
    loss, gradient = run(
        case,
        torch.cat([logits, padding], -1),
        labels,
        torch.cat([teacher, padding], -1),
        upstream,
        vocab_size=29,
        backend=backend,
    )
    assert torch.equal(gradient[:, 29:], torch.zeros(6, 8))
    assert_close_to_truth(loss, gradient[:, :29], expected)


# ---- ignored tokens


@every_backend
@pytest.mark.parametrize("ignore_index", [-100, 0, 5])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@every_case
def test_ignored_tokens_are_exact_zeros_whatever_their_logits(case, junk, ignore_index, backend):
    logits, labels, teacher, upstream = draw()
    labels = torch.tensor([1, ignore_index, 2, 3, ignore_index, 4])
    ignored = labels == ignore_index
    logits[ignored], teacher[ignored], upstream[4] = junk, junk, math.nan
    keywords = dict(backend=backend, ignore_index=ignore_index)
    loss, gradient = run(case, logits, labels, teacher, upstream, **keywords)
    assert torch.equal(loss[ignored], torch.zeros(2))
    assert torch.equal(gradient[ignored], torch.zeros(2, 37))
    kept = [tensor[~ignored] for tensor in (logits, labels, teacher, upstream)]
    samples = case.samples(labels)
    expected = run(case, *kept, backend=backend, samples=None if samples is None else samples.rows(~ignored))
    assert torch.equal(loss[~ignored], expected[0])
    assert torch.equal(gradient[~ignored], expected[1])


@every_backend
def test_a_batch_without_supervision(backend):
    logits, labels, teacher, upstream = draw()
    for case in TYPICAL.values():
        loss, gradient = run(case, logits, torch.full_like(labels, -100), teacher, upstream, backend=backend)
        assert not loss.any() and not gradient.any()


# ---- values that no loss can be computed from


@every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 11, 36])
@every_case
def test_a_nan_or_infinite_logit_makes_that_tokens_loss_nan(case, column, value, backend):
    logits, labels, teacher, upstream = draw()
    clean = run(case, logits, labels, teacher, upstream, backend=backend)
    logits[2, column] = value
    labels[2] = 11
    loss, gradient = run(case, logits, labels, teacher, upstream, backend=backend)
    assert loss[2].isnan() and gradient[2].isnan().any()
    # Of a mean over the sample's tokens, those of the other sample.
    others = [0, 1, 3, 4, 5] if not case.objective.needs_samples else [3, 4, 5]
    assert torch.equal(loss[others], clean[0][others])
    assert torch.equal(gradient[others], clean[1][others])


@every_backend
@pytest.mark.parametrize("name", ["kd", "kd-T2", "target-sft", "target-sft-eta1"])
@pytest.mark.parametrize("how", ["all -inf", "nan", "+inf"])
def test_a_teacher_row_that_is_no_distribution_makes_the_loss_nan(name, how, backend):
    logits, labels, teacher, upstream = draw()
    if how == "all -inf":
        teacher[3] = -math.inf
    else:
        teacher[3, 7] = float(how)
    loss, gradient = run(CASES[name], logits, labels, teacher, upstream, backend=backend)
    assert loss.isnan().tolist() == [False, False, False, True, False, False]
    assert gradient[3].isnan().any()


@every_backend
def test_a_teacher_without_a_distribution_shows_even_where_its_mass_is_zero(backend):
    # p(y) = 1: the residual has mass 0, which must not hide that there is no residual.
    logits, labels, teacher, upstream = draw()
    logits[3, labels[3]] = 1e4
    teacher[3] = -math.inf
    loss, _ = run(CASES["target-sft"], logits, labels, teacher, upstream, backend=backend)
    assert loss[3].isnan()


@every_backend
@typical_case
def test_a_student_row_of_minus_infinity_makes_the_loss_nan(case, backend):
    logits, labels, teacher, upstream = draw()
    logits[1] = -math.inf
    loss, _ = run(case, logits, labels, teacher, upstream, backend=backend)
    assert loss.isnan().tolist() == [False, True, False, False, False, False]


@every_backend
@typical_case
def test_masking_a_nan_token_downstream_leaves_exact_zeros(case, backend):
    logits, labels, teacher, upstream = draw()
    logits[2, 5] = math.nan
    upstream[2] = 0
    loss, gradient = run(case, logits, labels, teacher, upstream, backend=backend)
    assert loss[2].isnan()
    assert torch.equal(gradient[2], torch.zeros(37))
    assert gradient[[0, 1, 3, 4, 5]].isfinite().all()


# ---- memory and autograd


@every_backend
@typical_case
def test_callers_tensors_are_not_modified(case, backend):
    drawn = draw()
    copies = [tensor.clone() for tensor in drawn]
    run(case, *drawn, backend=backend)
    for tensor, copy in zip(drawn, copies, strict=True):
        assert torch.equal(tensor, copy)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@typical_case
def test_inplace_writes_the_gradient_over_the_logits(case, dtype, backend):
    logits, labels, teacher, upstream = draw((3, 4), dtype=dtype)
    expected = run(case, logits, labels, teacher, upstream, backend=backend)
    leaf = logits.clone().requires_grad_()
    logits = leaf * 1  # what a model would hand over: no leaf
    address, untouched = logits.data_ptr(), logits.detach().clone()
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    loss = call(case, logits, labels, teacher, backend=backend, inplace=True)
    assert torch.equal(logits.detach(), untouched), "forward must not write"
    loss.backward(upstream)
    assert seen == [address]
    assert torch.equal(logits.detach(), expected[1])
    assert torch.equal(leaf.grad, expected[1]) and torch.equal(loss.detach(), expected[0])


@every_backend
def test_a_second_backward_over_overwritten_logits_is_refused(backend):
    logits, labels, teacher, upstream = draw()
    logits = logits.requires_grad_() * 1
    loss = call(CASES["sft"], logits, labels, teacher, backend=backend, inplace=True)
    loss.backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=False with retain_graph=True"):
        loss.backward(upstream)


@every_backend
def test_autograd_notices_that_others_needed_the_overwritten_logits(backend):
    logits, labels, teacher, upstream = draw()
    logits = logits.requires_grad_() * 1
    square = logits.square()  # keeps the logits for its own backward
    call(CASES["sft"], logits, labels, teacher, backend=backend, inplace=True).backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@every_backend
def test_backward_may_run_again_with_other_upstream_gradients(backend):
    logits, labels, teacher, upstream = draw()
    leaf = logits.requires_grad_()
    loss = call(CASES["target-sft"], leaf, labels, teacher, backend=backend)
    (first,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf, -2 * upstream)
    assert torch.equal(again, -2 * first)


@every_backend
def test_double_backward_is_refused(backend):
    # Not dropped silently: the gradient would count as a constant.
    logits, labels, teacher, _ = draw()
    leaf = logits.requires_grad_()
    loss = call(CASES["dft"], leaf, labels, teacher, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative.*without create_graph"):
        torch.autograd.grad(loss.sum(), leaf, create_graph=True)


@every_backend
@pytest.mark.parametrize("name", ["kd", "kd-T2", "target-sft", "target-sft-eta1"])
def test_the_teacher_never_receives_a_gradient(name, backend):
    logits, labels, teacher, upstream = draw()
    logits.requires_grad_()
    teacher.requires_grad_()
    call(CASES[name], logits, labels, teacher, backend=backend).backward(upstream)
    assert teacher.grad is None and logits.grad is not None


# ---- statistics


@every_backend
def test_statistics_of_target_sft(backend):
    case = CASES["target-sft"]
    logits, labels, teacher, _ = draw((2, 3))
    labels[1, 2] = -100
    loss, statistics = call(case, logits, labels, teacher, backend=backend, return_statistics=True)
    assert torch.equal(loss, call(case, logits, labels, teacher, backend=backend))
    log_p = torch.log_softmax(logits.double(), -1)
    log_r = torch.log_softmax(0.7 * logits.double() + 0.3 * teacher.double(), -1)
    supervised = labels != -100
    log_p_y = log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    (residual,) = statistics.residuals
    expected = {
        "log_p": log_p_y,
        "p": log_p_y.exp(),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "label_mass": log_p_y.exp(),
        "residual_mass": 1 - log_p_y.exp(),
        "trust": log_p_y.exp(),
        "lse": logits.double().logsumexp(-1),
    }
    found = {name: getattr(statistics, name) for name in expected}
    expected["mean_logit"] = (log_r.exp() * logits).sum(-1)
    found["mean_logit"] = residual.mean_logit
    # Nobody asked for these.
    assert residual.entropy is residual.log_p is statistics.collision is statistics.top_logits is None
    assert torch.equal(statistics.supervised, supervised)
    for name, value in expected.items():
        assert found[name].shape == (2, 3) and not found[name].requires_grad, name
        torch.testing.assert_close(
            found[name][supervised],
            value[supervised],
            rtol=1e-6,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        assert found[name][1, 2] == 0, name


@every_backend
def test_trust_is_nan_where_there_is_no_mass(backend):
    logits, labels, teacher, _ = draw()
    labels[0] = -100
    _, statistics = call(CASES["kd-T2"], logits, labels, teacher, backend=backend, return_statistics=True)
    assert torch.equal(statistics.total_mass, torch.zeros(6, dtype=torch.float64))
    assert statistics.trust[1:].isnan().all() and statistics.trust[0] == 0
    first, second = statistics.residuals
    expected = [
        -(torch.softmax(x.double() / 2, -1) * torch.log_softmax(x.double() / 2, -1)).sum(-1) for x in (logits, teacher)
    ]
    torch.testing.assert_close(first.entropy[1:], expected[0][1:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second.entropy[1:], expected[1][1:], rtol=1e-6, atol=1e-6)


@every_backend
@pytest.mark.parametrize("k", [1, 20, 37, 50])
def test_statistics_on_request(k, backend):
    def evaluate(stats, inputs):
        return stats.weighted_nll(stats.p), stats.p, (0.0, 0.0)

    residuals = ((0.5, 0.5), (0.0, 1.0))
    wanted = dict(collision=True, top_k=k, residual_entropy=True, residual_label=True)
    objective = Objective(evaluate, residuals=residuals, **wanted)
    logits, labels, teacher, _ = draw((2, 3))
    labels[0, 1] = -100
    _, found = qtarget_cross_entropy(
        logits, labels, objective=objective, teacher_logits=teacher, backend=backend, return_statistics=True
    )
    z, t, supervised = logits.double(), teacher.double(), labels != -100
    close = dict(rtol=1e-6, atol=1e-6)
    collision = torch.softmax(z, -1).square().sum(-1)
    torch.testing.assert_close(found.collision[supervised], collision[supervised], **close)
    largest = z.sort(-1, descending=True).values[..., :k]
    assert found.top_logits.shape == (2, 3, k)
    assert torch.equal(found.top_logits[supervised][:, :37], largest[supervised])
    assert (found.top_logits[supervised][:, 37:] == -torch.inf).all()
    for (a, b), residual in zip(residuals, found.residuals, strict=True):
        log_r = torch.log_softmax(a * z + b * t, -1)
        entropy, label = -(log_r.exp() * log_r).sum(-1), log_r.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        torch.testing.assert_close(residual.entropy[supervised], entropy[supervised], **close)
        torch.testing.assert_close(residual.log_p[supervised], label[supervised], **close)
    for value in (found.collision, found.top_logits, found.residuals[0].entropy, found.residuals[0].log_p):
        assert (value[~supervised] == 0).all()


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda stats, inputs: (stats.kl_divergence(), stats.p, (1.0,)), r"residual_entropy=True"),
        (lambda stats, inputs: (stats.top_k_entropy(), stats.p, (1.0,)), r"top_k=K"),
    ],
)
def test_a_statistic_that_was_not_requested_is_named(evaluate, message):
    logits, labels, teacher, _ = draw((2, 3))
    objective = Objective(evaluate, residuals=((0.0, 1.0),))
    with pytest.raises(ValueError, match=message):
        qtarget_cross_entropy(logits, labels, objective=objective, teacher_logits=teacher)


@every_backend
@pytest.mark.parametrize(("name", "trust"), [("sft", 1.0), ("label-smoothing", 0.9), ("kd", 0.0)])
def test_trust_is_the_labels_share_of_the_mass(name, trust, backend):
    _, statistics = call(CASES[name], *draw()[:3], backend=backend, return_statistics=True)
    torch.testing.assert_close(statistics.trust, torch.full((6,), trust, dtype=torch.float64))


# ---- side inputs


@every_backend
def test_token_inputs_reach_the_objective(backend):
    def evaluate(stats, inputs):
        return stats.weighted_nll(inputs["weight"]), inputs["weight"], ()

    weighted = Objective(evaluate, token_inputs=("weight",))
    logits, labels, _, _ = draw((2, 3))
    leaf = logits.requires_grad_()
    weight = torch.rand(2, 3, requires_grad=True)
    loss = qtarget_cross_entropy(leaf, labels, objective=weighted, token_inputs={"weight": weight}, backend=backend)
    loss.sum().backward()
    expected = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none") * weight
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(expected.sum(), leaf)[0])
    assert weight.grad is None


# ---- any combination


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@given(data=st.data())
@settings(max_examples=150)
def test_any_shape_mask_padding_and_objective_is_the_definition(backend, data):
    """The reference in float64 to 1e-12, the native kernels in their dtypes."""
    name = data.draw(st.sampled_from(sorted(RANDOM_CASES)), label="objective")
    case = RANDOM_CASES[name](lambda low, high: data.draw(st.floats(low, high), label="parameter"))
    dtypes = {
        "reference": [torch.float64],
        "cpp": [torch.float32, torch.bfloat16, torch.float16],
    }
    dtype = data.draw(st.sampled_from(dtypes[backend]), label="dtype")
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3), label="shape")
    vocab_size = data.draw(st.integers(1, 70), label="vocab_size")
    padding = data.draw(st.integers(0, 9), label="padding")
    ignored = data.draw(st.sampled_from([0.0, 0.3, 1.0]), label="ignored share")
    scale = data.draw(st.sampled_from([0.1, 1.0, 5.0]), label="scale")
    inplace = data.draw(st.booleans(), label="inplace")
    torch.manual_seed(data.draw(st.integers(0, 10_000), label="seed"))

    columns = vocab_size + padding
    logits, teacher = (scale * torch.randn(2, *shape, columns)).to(dtype)
    logits[..., vocab_size:], teacher[..., vocab_size:] = math.nan, 1e4
    labels, upstream = torch.randint(vocab_size, shape), torch.randn(shape)
    labels[torch.rand(shape) < ignored] = -100
    expected = truth(case, logits, labels, teacher, upstream, vocab_size)
    loss, gradient = run(
        case,
        logits,
        labels,
        teacher,
        upstream,
        vocab_size=vocab_size,
        inplace=inplace,
        backend=backend,
    )
    # Half a step of float32 in u = a z + b t, for each product and for the sum; |z|, |t| < 5.5 standard deviations.
    largest = max((abs(a) + abs(b) for a, b in case.objective.residuals), default=0) * 5.5 * scale
    assert_close_to_truth(loss, gradient, expected, 0.0 if dtype == torch.float64 else 3 * largest * 2**-24)
    assert (gradient[..., vocab_size:] == 0).all() and (gradient[labels == -100] == 0).all()
