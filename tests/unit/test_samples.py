"""Means over a sample's tokens: against loops, what is refused, and iw-sft, which stands on them."""

import math

import pytest
import torch
from loss_definitions import CASES
from objective_runs import draw, run

from qtarget_megatron import Objective, Samples, objectives, qtarget_cross_entropy, qtarget_linear_cross_entropy


def test_means_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, (50,), generator=generator)
    values, supervised = torch.randn(50, generator=generator).double(), torch.rand(50, generator=generator) < 0.6
    supervised[ids == 2] = False
    values[~supervised] = math.nan
    mean, size = Samples(ids, 9).means(values, supervised)
    for token, sample in enumerate(ids.tolist()):
        of_sample = values[(ids == sample) & supervised].tolist()
        assert size[token] == len(of_sample)
        assert mean[token] == pytest.approx(sum(of_sample) / len(of_sample) if of_sample else 0.0, abs=1e-15)


def test_nan_stays_in_its_sample():
    ids, supervised = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    mean, _ = Samples(ids, 2).means(torch.tensor([1.0, math.nan, 2.0, 4.0], dtype=torch.float64), supervised)
    assert mean.isnan().tolist() == [True, True, False, False] and mean[2] == 3


@pytest.mark.parametrize("block", [1, 3])
def test_sums_of_what_comes_after_are_those_of_a_loop(block):
    """Tokens of a sample in any order; numbers whose sums differ with the order in which they are added."""
    generator = torch.Generator().manual_seed(0)
    ids, order = torch.randint(6, (60,), generator=generator), torch.randperm(60, generator=generator)
    values = torch.randn(60, generator=generator).double() * 10.0 ** torch.randint(-9, 5, (60,), generator=generator)
    supervised = torch.rand(60, generator=generator) < 0.7
    supervised[ids == 2] = False
    values[~supervised] = math.nan
    after, count = Samples(ids, 9, order=order).after(values, supervised, block)
    for token in range(60):
        if not supervised[token]:
            assert after[token] == count[token] == 0
            continue
        places = [other for other in order.argsort().tolist() if supervised[other] and ids[other] == ids[token]]
        rest = places[(places.index(token) // block + 1) * block :]
        assert count[token] == len(rest)
        assert after[token].item() == pytest.approx(math.fsum(values[rest].tolist()), rel=1e-15, abs=1e-16)


def test_nan_is_of_the_tokens_before_it_in_its_sample():
    ids, supervised = torch.tensor([0, 0, 0, 1, 1]), torch.ones(5, dtype=torch.bool)
    for value in (math.nan, math.inf, -math.inf):
        after, _ = Samples(ids, 2).after(torch.tensor([1.0, value, 2.0, 4.0, 8.0]).double(), supervised)
        assert after.isnan().tolist() == [True, False, False, False, False] and after[3] == 8


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Samples(torch.zeros(3), 1), "int64 ids and a count of 1 or more, got torch.float32 and 1"),
        (lambda: Samples(torch.zeros(3, dtype=torch.int64), 0), "a count of 1 or more, got torch.int64 and 0"),
        (lambda: Samples(torch.tensor([0, 2]), 2), r"sample ids must be in 0\.\.1, got 2"),
        (
            lambda: Samples(torch.zeros(3).long(), 1, None, torch.zeros(3)),
            r"is int64 \[3\] like ids, got torch.float32",
        ),
        (lambda: Samples(torch.tensor([-1, 0]), 2), r"sample ids must be in 0\.\.1, got -1"),
    ],
)
def test_what_is_no_sample_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_samples_that_are_missing_or_of_other_tokens_are_refused():
    logits, labels, hidden, weight = torch.zeros(4, 7), torch.zeros(4).long(), torch.zeros(4, 3), torch.zeros(7, 3)
    objective = objectives.iw_sft(start="data")
    inputs = dict(token_inputs={"old_log_prob": torch.full((4,), -1.0)}, objective=objective)
    with pytest.raises(ValueError, match=r"iw-sft\(.*\) takes means over samples: pass samples"):
        qtarget_cross_entropy(logits, labels, **inputs)
    other = Samples(torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"sample ids must be \[4\] on cpu like labels, got \[3\]"):
        qtarget_linear_cross_entropy(hidden, weight, labels, samples=other, **inputs)
    # Not read by others.
    assert qtarget_cross_entropy(logits, labels, objective=objectives.sft(), samples=other).shape == (4,)


def test_statistics_of_samples_come_back():
    logits, labels, _, _ = draw(rows=6)
    labels[2] = -100

    def evaluate(stats, inputs):
        return None, stats.sample_size, ()

    objective = Objective(evaluate, sample_mean=lambda stats, inputs: stats.log_p)
    samples = Samples(torch.tensor([[0, 0, 0], [1, 1, 1]]), 2)
    _, stats = qtarget_cross_entropy(
        logits.view(2, 3, -1), labels.view(2, 3), objective=objective, samples=samples, return_statistics=True
    )
    assert stats.sample_size.tolist() == [[2, 2, 2], [3, 3, 3]]
    log_p = torch.log_softmax(logits.double(), -1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    expected = [(log_p[0] + log_p[1]) / 2, log_p[3:].mean()]
    torch.testing.assert_close(stats.sample_mean, torch.stack(expected)[:, None].expand(2, 3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.label_mass[stats.supervised], stats.sample_size[stats.supervised])
    hidden, weight = torch.randn(2, 3, 5), torch.randn(11, 5)
    labels = labels.view(2, 3).clamp(max=10)
    arguments = dict(objective=objective, samples=samples, return_statistics=True)
    _, fused = qtarget_linear_cross_entropy(hidden, weight, labels, chunk_size=2, **arguments)
    _, whole = qtarget_cross_entropy(hidden @ weight.t(), labels, **arguments)
    kept = whole.supervised
    torch.testing.assert_close(fused.sample_mean[kept], whole.sample_mean[kept], rtol=1e-5, atol=1e-6)
    assert torch.equal(fused.sample_size[kept], whole.sample_size[kept])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_iw_sft_begins_as_sft_and_counts_what_has_become_likelier(backend):
    logits, labels, _, upstream = draw(rows=12)
    case = CASES["iw-sft"]
    loss, gradient = run(case, logits, labels, logits, upstream, backend=backend)
    sft_loss, sft_gradient = run(CASES["sft"], logits, labels, logits, upstream, backend=backend)
    torch.testing.assert_close(loss, sft_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, sft_gradient, rtol=1e-6, atol=1e-9)
    # Of the second sample of three tokens, one is found likelier than by the model at the start.
    before = logits.clone()
    before[4, labels[4]] -= 3
    found = run(case, logits, labels, before, upstream, backend=backend)[0] / sft_loss
    ratio = torch.log_softmax(logits.double(), -1) - torch.log_softmax(before.double(), -1)
    weight = (0.3 * ratio[4, labels[4]] / 3).exp().clip(max=2.0)
    expected = torch.ones(12)
    expected[3:6] = weight
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_weight_is_clamped():
    logits, labels, _, upstream = draw(rows=6)
    before = logits.clone()
    before[torch.arange(6), labels] -= 200
    sft = run(CASES["sft"], logits, labels, logits, upstream)[0]
    torch.testing.assert_close(run(CASES["iw-sft"], logits, labels, before, upstream)[0], 2 * sft, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (dict(start="scratch"), "start must be 'model' or 'data', got 'scratch'"),
        (dict(maximum=0), r"maximum must be a number in \(0, inf\), got 0"),
        (dict(temperature=math.nan), "temperature must be a number in"),
    ],
)
def test_wrong_parameters_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        objectives.iw_sft(**parameters)
