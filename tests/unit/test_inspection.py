"""What a loss pulls the model to: read from the gradient of hand-written losses, and from an objective's masses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from qtarget_megatron import objectives
from qtarget_megatron.inspection import induced_target, inspect, target_distribution

N, V = 6, 11
IGNORED = 2


def sample(dtype=torch.float64):
    """Logits, labels (one ignored), a teacher's logits."""
    torch.manual_seed(3)
    logits = torch.randn(N, V, dtype=torch.float64) * 2
    labels = torch.randint(V, (N,))
    # A label that the model is sure of, and one it finds all but impossible.
    logits[0, labels[0]], logits[1, labels[1]] = 9.0, -9.0
    labels[IGNORED] = -100
    return logits.to(dtype), labels, torch.randn(N, V, dtype=torch.float64).to(dtype)


def log_p_of(z, y):
    return z.log_softmax(-1).gather(-1, y.clamp(min=0)[:, None])[:, 0]


def kl(target, z):
    return (target * (target.log() - z.log_softmax(-1))).sum(-1)


# ---- losses as the papers write them: per token, from whole rows

LOGITS, LABELS, TEACHER = sample()
WEIGHT = torch.linspace(0.2, 3.0, N, dtype=torch.float64)
CRITICAL = torch.tensor([1.0, 0, 1, 0, 1, 1], dtype=torch.float64)
OLD = log_p_of(LOGITS, LABELS) - torch.tensor([0.0, 0.1, 0.2, -0.5, 0.4, -0.1], dtype=torch.float64)


def eaft(z, y, k=5):
    q = z.detach().topk(k).values.softmax(-1)
    return (q * q.log()).sum(-1) / math.log(k) * log_p_of(z, y)


def psft(z, y):
    ratio = (log_p_of(z, y) - OLD).exp()
    return -torch.minimum(ratio, ratio.clamp(0.8, 1.28))


def label_smoothing(z, y):
    return -0.9 * log_p_of(z, y) - 0.1 * z.log_softmax(-1).mean(-1)


def gem(z, y, beta=0.7):
    return -log_p_of(z, y) + ((z.detach() / beta).softmax(-1) * z.log_softmax(-1)).sum(-1)


def target_sft(z, y, eta=0.3):
    p_y = log_p_of(z, y).exp().detach()[:, None]
    residual = ((1 - eta) * z.detach() + eta * TEACHER).softmax(-1)
    q = p_y * F.one_hot(y.clamp(min=0), V) + (1 - p_y) * residual
    return -(q * z.log_softmax(-1)).sum(-1)


def kd_at_2(z, y):
    target, log_q = (TEACHER / 2).softmax(-1), (z / 2).log_softmax(-1)
    return 4 * (target * (target.log() - log_q)).sum(-1)


def asft(z, y):
    return -log_p_of(z, y).exp().detach() * log_p_of(z, y) + 0.05 * kl(TEACHER.softmax(-1), z)


def hybrid_kd(z, y):
    return -0.6 * log_p_of(z, y) + 0.4 * kl(TEACHER.softmax(-1), z)


PAPERS = {
    "sft": ({}, lambda z, y: F.cross_entropy(z, y, reduction="none")),
    "dft": ({}, lambda z, y: -log_p_of(z, y).exp().detach() * log_p_of(z, y)),
    "beyond-log": (dict(alpha=0.5), lambda z, y: (1 - log_p_of(z, y).exp() ** 0.5) / 0.5),
    "profit": (dict(tau=0.1), lambda z, y: -(log_p_of(z, y).detach().exp() >= 0.1).double() * log_p_of(z, y)),
    "eaft": (dict(k=5), eaft),
    "weighted-sft": ({}, lambda z, y: -WEIGHT * log_p_of(z, y)),
    "cft": ({}, lambda z, y: -CRITICAL * log_p_of(z, y)),
    "psft": (dict(refresh=0), psft),
    "label-smoothing": (dict(lam=0.1), label_smoothing),
    "gem": (dict(beta=0.7), gem),
    "sft-kl": (dict(lam=0.2), lambda z, y: -log_p_of(z, y) + 0.2 * kl(TEACHER.softmax(-1), z)),
    "asft": (dict(lam=0.05), asft),
    "kd": (dict(temperature=2.0), kd_at_2),
    "hybrid-kd": (dict(lam=0.4), hybrid_kd),
    "target-sft": (dict(eta=0.3), target_sft),
}


def of_objective(name, **parameters):
    inputs = dict(weight=WEIGHT, critical=CRITICAL, old_log_prob=OLD)
    objective = objectives.get(name, **parameters)
    return target_distribution(objective, LOGITS, LABELS, teacher_logits=TEACHER, token_inputs=inputs)


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_loss_induces_the_objectives_target(name):
    parameters, loss = PAPERS[name]
    induced = induced_target(loss, LOGITS, LABELS)
    known = of_objective(name, **parameters)
    torch.testing.assert_close(induced.q, known.q, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(induced.moved_mass, known.moved_mass, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(induced.gradient_sum, torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)
    if name not in ("gem", "sft-kl", "psft", "weighted-sft", "kd"):  # whose raw Q may be negative
        assert induced.valid.tolist() == [True, True, False, True, True, True]
    supervised = LABELS != -100
    torch.testing.assert_close(loss(LOGITS, LABELS)[supervised], known.loss[supervised], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PAPERS)
def test_the_normalised_target_is_made_of_the_masses_and_residuals(name):
    """Independent of the gradient: one-hot and residual rows, weighed and divided by the total mass."""
    parameters, _ = PAPERS[name]
    objective = objectives.get(name, **parameters)
    known = of_objective(name, **parameters)
    total = known.label_mass + known.residual_mass
    rows = known.label_mass[:, None] * F.one_hot(LABELS.clamp(min=0), V)
    # kd at a temperature has two, of masses -T and T: nothing is left to normalise.
    assert len(objective.residuals) <= 1 or (name == "kd" and (total == 0).all())
    for a, b in objective.residuals[:1]:
        rows = rows + known.residual_mass[:, None] * (a * LOGITS + b * TEACHER).softmax(-1)
    expected = torch.where(total[:, None] == 0, torch.nan, rows / total[:, None])
    torch.testing.assert_close(known.normalised, expected, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert known.normalised[IGNORED].isnan().all()
    if name in ("gem", "kd"):
        assert known.normalised.isnan().all() and known.normalised_trust.isnan().all()


def test_trust_is_the_weight_of_every_reweighted_likelihood():
    p_y = log_p_of(LOGITS, LABELS).exp()
    supervised = LABELS != -100
    for name, weight in {
        "sft": torch.ones(N, dtype=torch.float64),
        "dft": p_y,
        "beyond-log": p_y**0.5,
        "profit": (p_y >= 0.1).double(),
        "weighted-sft": WEIGHT,
        "cft": CRITICAL,
    }.items():
        induced = induced_target(PAPERS[name][1], LOGITS, LABELS)
        torch.testing.assert_close(induced.trust[supervised], weight[supervised], rtol=1e-9, atol=1e-12)
        assert induced.trust[IGNORED].isnan()
        # What the label is not trusted with stays the model's own.
        partial = supervised & ((1 - weight).abs() > 1e-3)
        torch.testing.assert_close(induced.residual[partial], LOGITS.softmax(-1)[partial], rtol=1e-6, atol=1e-9)
        assert induced.residual[~partial].isnan().all()


def test_an_objectives_trust_and_residual_need_no_assumption():
    known = of_objective("target-sft", eta=0.3)
    supervised = LABELS != -100
    torch.testing.assert_close(known.trust[supervised], log_p_of(LOGITS, LABELS).exp()[supervised])
    residual = (0.7 * LOGITS + 0.3 * TEACHER).softmax(-1)
    torch.testing.assert_close(known.residual[supervised], residual[supervised], rtol=1e-6, atol=1e-9)
    # The same gradient without the masses: the label's share of the residual reads as trust.
    blind = induced_target(target_sft, LOGITS, LABELS)
    share = residual.gather(-1, LABELS.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(blind.trust[supervised], share[supervised], rtol=1e-8, atol=1e-12)


def test_without_detach_p_log_p_turns_against_the_label_below_one_over_e():
    p_y = torch.tensor([0.1, 0.3, 1 / math.e, 0.45, 0.9], dtype=torch.float64)
    logits = torch.stack([p_y, 1 - p_y], -1).log()
    labels = torch.zeros(5, dtype=torch.int64)
    raw = induced_target(lambda z, y: -log_p_of(z, y).exp() * log_p_of(z, y), logits, labels)
    torch.testing.assert_close(raw.trust, p_y * (1 + p_y.log()), rtol=1e-9, atol=1e-12)
    assert (raw.trust[:2] < 0).all() and raw.trust[2].abs() < 1e-12 and (raw.trust[3:] > 0).all()
    assert (raw.label_probability[:2] < p_y[:2]).all() and (raw.label_probability[3:] > p_y[3:]).all()
    detached = induced_target(PAPERS["dft"][1], logits, labels)
    assert (detached.trust > 0).all()


def test_a_scalar_is_a_sum_or_a_mean_over_supervised_tokens():
    expected = induced_target(PAPERS["sft"][1], LOGITS, LABELS).q
    for reduction in ("sum", "mean"):

        def scalar(z, y, reduction=reduction):
            return F.cross_entropy(z, y, reduction=reduction)

        torch.testing.assert_close(induced_target(scalar, LOGITS, LABELS, reduction=reduction).q, expected)
    shaped = induced_target(PAPERS["sft"][1], LOGITS[0], LABELS[0])
    assert shaped.q.shape == (V,) and shaped.trust.shape == ()
    batch = induced_target(
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(2, 3),
        LOGITS.view(2, 3, V),
        LABELS.view(2, 3),
    )
    torch.testing.assert_close(batch.q.view(N, V), expected)


def test_the_callers_tensors_stay_as_they_are():
    logits, labels, teacher = sample(torch.float32)
    logits.requires_grad_()
    logits.register_hook(lambda gradient: pytest.fail("a gradient reached the caller's logits"))
    teacher.requires_grad_()
    before, labels_before = logits.detach().clone(), labels.clone()

    def careless(z, y):
        loss = F.cross_entropy(z, y.clone(), reduction="none")
        z.detach().zero_()  # in place, as Megatron's cross-entropy works
        y.zero_()
        return loss

    with torch.no_grad():
        induced = induced_target(careless, logits, labels)
        known = target_distribution(objectives.target_sft(), logits, labels, teacher_logits=teacher)
    with torch.inference_mode():
        again = induced_target(PAPERS["sft"][1], logits * 1.0, labels)
        target_distribution(objectives.target_sft(), logits * 1.0, labels, teacher_logits=teacher * 1.0)
    assert torch.equal(logits, before) and torch.equal(labels, labels_before)
    assert logits.grad is None and teacher.grad is None
    assert torch.equal(induced.labels, labels) and not induced.q.requires_grad and not known.loss.requires_grad
    assert induced.q.dtype == torch.float64
    torch.testing.assert_close(induced.q, again.q)


def test_the_dtype_of_a_loss_that_takes_no_float64():
    def only_float32(z, y):
        if z.dtype != torch.float32:
            raise TypeError("float32 only")
        return F.cross_entropy(z, y, reduction="none")

    logits, labels, _ = sample(torch.float32)
    with pytest.raises(TypeError, match="float32 only"):
        induced_target(only_float32, logits, labels)
    exact = induced_target(PAPERS["sft"][1], logits, labels)
    kept = induced_target(only_float32, logits, labels, dtype=None)
    cast = induced_target(lambda z, y: F.cross_entropy(z.float(), y, reduction="none"), logits, labels)
    for other in (kept, cast):
        assert other.q.dtype == torch.float64
        assert torch.equal(other.valid, exact.valid)
        torch.testing.assert_close(other.q, exact.q, rtol=0, atol=1e-6)


def test_ignored_tokens_have_no_target_whatever_their_logits_hold():
    logits, labels, teacher = sample()
    expected = induced_target(PAPERS["sft"][1], logits, labels)
    logits[IGNORED], teacher[IGNORED] = torch.nan, torch.nan
    for target in (
        induced_target(PAPERS["sft"][1], logits, labels),
        target_distribution(objectives.sft(), logits, labels),
        target_distribution(objectives.sft_kl(lam=0.1), logits, labels, teacher_logits=teacher),
    ):
        for rows in (target.q, target.p, target.gradient):
            assert (rows[IGNORED] == 0).all() and rows.isfinite().all()
        assert target.label_probability[IGNORED] == 0 and target.moved_mass[IGNORED] == 0
        assert target.trust[IGNORED].isnan() and target.residual[IGNORED].isnan().all()
        assert not target.valid[IGNORED]
    torch.testing.assert_close(target_distribution(objectives.sft(), logits, labels).q, expected.q)


def test_a_loss_of_more_than_the_softmax_is_reported_not_refused():
    z_loss = induced_target(
        lambda z, y: F.cross_entropy(z, y, reduction="none") + 0.1 * z.logsumexp(-1) ** 2, LOGITS, LABELS
    )
    supervised = LABELS != -100
    torch.testing.assert_close(z_loss.gradient_sum[supervised], 0.2 * LOGITS.logsumexp(-1)[supervised])
    assert not z_loss.valid.any()


def test_a_label_the_model_is_certain_of_has_no_trust_to_read():
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, -torch.inf, 0.0]], dtype=torch.float64)
    target = induced_target(lambda z, y: -log_p_of(z, y), logits, torch.tensor([0, 2]))
    assert target.trust[0].isnan() and target.residual[0].isnan().all()
    assert target.trust[1] == pytest.approx(1) and target.q[1].tolist() == pytest.approx([0, 0, 1])
    # An impossible label: the loss is infinite, its target is not.
    impossible = target_distribution(objectives.sft(), logits, torch.tensor([1, 1]))
    assert impossible.loss.isinf().all() and impossible.q.tolist() == [[0, 1, 0]] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=LOGITS.long()), "logits must be floating point, got torch.int64"),
        (dict(labels=LABELS.int()), "labels must be int64"),
        (dict(labels=LABELS[:-1]), "logits must be .* labels \\[5\\]"),
        (dict(logits=LOGITS[:, :0]), "logits must be"),
        (dict(labels=torch.full((N,), V)), "labels must be in 0..10 .* got 11"),
        (dict(labels=torch.full((N,), -100)), "expected a supervised token"),
        (dict(loss_fn=lambda z, y: log_p_of(z, y) * torch.inf), "not finite at 5 supervised token"),
        (dict(loss_fn=lambda z, y: (z[0] / 0).sum()), "not finite: "),
        (dict(loss_fn=lambda z, y: y.double()), "does not depend on the logits"),
        (dict(loss_fn=lambda z, y: log_p_of(z, y).detach()), "does not depend on the logits"),
        (dict(loss_fn=lambda z, y: z.log_softmax(-1)), "one loss per token \\[6\\] or a scalar, got \\[6, 11\\]"),
        (dict(loss_fn=lambda z, y: 1.0), "must return a floating-point tensor, got float"),
        (dict(loss_fn=lambda z, y: log_p_of(z, y).mean(), reduction="mean"), "gradient to 1 token"),
        (dict(reduction="none"), "reduction must be 'sum' or 'mean'"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(change, message):
    given = dict(loss_fn=PAPERS["sft"][1], logits=LOGITS, labels=LABELS) | change
    with pytest.raises(ValueError, match=message) as error:
        induced_target(given.pop("loss_fn"), given.pop("logits"), given.pop("labels"), **given)
    assert "\n" not in str(error.value)


# ---- one sample as plain data


def test_inspect_recomputed_for_one_token():
    """Every figure of one token, from autograd of the definitions and plain softmax."""
    chosen = [objectives.sft(), objectives.target_sft(eta=0.3), objectives.gem()]
    found = inspect(chosen, LOGITS.float(), LABELS, decode=lambda i: f"t{i}", teacher_logits=TEACHER.float(), top=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["num_tokens"], found["vocab_size"]) == (N - 1, V)
    assert [token["position"] for token in found["tokens"]] == [0, 1, 3, 4, 5]
    token, row = found["tokens"][3], 4
    label = int(LABELS[row])
    z, t = LOGITS.float().double()[row], TEACHER.float().double()[row]
    p = z.softmax(-1)
    assert (token["id"], token["text"]) == (label, f"t{label}")
    assert token["p"] == pytest.approx(p[label].item())
    assert token["log_p"] == pytest.approx(p[label].log().item())
    assert token["entropy"] == pytest.approx(-(p * p.log()).sum().item())

    onehot = F.one_hot(torch.tensor(label), V)
    residual = (0.7 * z + 0.3 * t).softmax(-1)
    tempered = (z / 0.7).softmax(-1)
    masses = {"sft": (1, 0), "target-sft": (p[label].item(), 1 - p[label].item()), "gem": (1, -1)}
    raw = {
        "sft": onehot.double(),
        "target-sft": p[label] * onehot + (1 - p[label]) * residual,
        "gem": p + onehot - tempered,
    }
    losses = {
        "sft": -p[label].log(),
        "target-sft": -(raw["target-sft"] * p.log()).sum(),
        "gem": -p[label].log() + (tempered * p.log()).sum(),
    }
    expected_ids = {label, *p.topk(2).indices.tolist()}
    for q in raw.values():
        expected_ids |= {index for index in q.topk(2).indices.tolist() if q[index] > 1e-9}
    for objective, reading in zip(chosen, token["objectives"], strict=True):
        name, q = objective.name, raw[objective.name]
        label_mass, residual_mass = masses[name]
        total = label_mass + residual_mass
        assert reading["loss"] == pytest.approx(losses[name].item())
        assert reading["trust"] == pytest.approx(label_mass)
        assert reading["residual_mass"] == pytest.approx(residual_mass)
        assert reading["total_mass"] == pytest.approx(total)
        assert reading["normalised_trust"] == (None if name == "gem" else pytest.approx(label_mass / total))
        assert reading["moved_mass"] == pytest.approx((q - p).abs().sum().item() / 2)
        assert reading["label_probability"] == pytest.approx(q[label].item())
        assert reading["valid"] == (name != "gem")
        listed = {one["id"]: one for one in reading["alternatives"]}
        assert set(listed) == expected_ids
        for index, one in listed.items():
            assert one["text"] == f"t{index}"
            assert one["p"] == pytest.approx(p[index].item())
            assert one["q"] == pytest.approx(q[index].item(), abs=1e-12)
            assert one["change"] == pytest.approx((q - p)[index].item(), abs=1e-12)
            assert one["normalised"] == (None if name == "gem" else pytest.approx(q[index].item(), abs=1e-12))
        heights = [max(one["p"], one["q"]) for one in reading["alternatives"]]
        assert heights == sorted(heights, reverse=True)


def test_inspect_compares_objectives_by_means_over_the_supervised_tokens():
    found = inspect([objectives.dft(), objectives.gem()], LOGITS, LABELS, decode=str)
    supervised = LABELS != -100
    p_y = log_p_of(LOGITS, LABELS).exp()[supervised]
    assert found["mean_p"] == pytest.approx(p_y.mean().item())
    dft, gem_row = found["objectives"]
    assert (dft["objective"], dft["name"], dft["parameters"], dft["needs_teacher"]) == ("dft()", "dft", {}, False)
    assert gem_row["parameters"] == {"beta": 0.7, "h": "linear"}
    assert dft["mean_loss"] == pytest.approx((-p_y * p_y.log()).mean().item())
    assert dft["mean_trust"] == dft["mean_total_mass"] == pytest.approx(p_y.mean().item())
    assert dft["mean_moved_mass"] == pytest.approx((p_y * (1 - p_y)).mean().item())
    assert 0 < dft["low_trust_share"] < 1
    assert dft["low_trust_share"] == pytest.approx((p_y < 0.1).double().mean().item())
    assert dft["mean_label_probability"] == pytest.approx((p_y + p_y * (1 - p_y)).mean().item())
    assert (dft["valid_share"], gem_row["mean_total_mass"]) == (1, 0)
    assert gem_row["valid_share"] < 1


def test_inspect_is_the_same_in_pieces(monkeypatch):
    inputs = dict(weight=WEIGHT)
    chosen = [objectives.target_sft(), objectives.weighted_sft()]
    given = dict(decode=str, teacher_logits=TEACHER, token_inputs=inputs)
    whole = inspect(chosen, LOGITS, LABELS, **given)
    monkeypatch.setattr("qtarget_megatron.inspection._LOGITS_AT_ONCE", 2 * V)
    assert inspect(chosen, LOGITS, LABELS, **given) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(objectives=[]), "expected at least one"),
        (dict(top=0), "top must be"),
        (dict(labels=LABELS.view(2, 3), logits=LOGITS.view(2, 3, V)), "labels must be \\[S\\]"),
        (dict(teacher_logits=TEACHER[:-1]), "teacher_logits must have 6 rows"),
        (dict(token_inputs=dict(weight=WEIGHT[:-1])), "weight must have 6 rows"),
        (dict(objectives=[objectives.kd()]), "needs a second model"),
        (dict(objectives=[objectives.weighted_sft()]), "weight"),
    ],
)
def test_inspect_says_what_is_missing(change, message):
    given = dict(objectives=[objectives.sft()], logits=LOGITS, labels=LABELS, decode=str) | change
    with pytest.raises(ValueError, match=message):
        inspect(given.pop("objectives"), given.pop("logits"), given.pop("labels"), **given)
