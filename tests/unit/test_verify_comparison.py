"""Bounds of a training follow from what one rank says about itself, and a fault at one rank does not widen them."""

import math

import pytest
import torch

from qtarget_megatron.megatron.verify.comparison import (
    CHANGE,
    LOSS,
    MARGIN,
    NORM,
    TOKENS,
    Bounds,
    OneRankTrainings,
    Reference,
    Training,
    compare_scalars,
    compare_tensors,
    gradient_of,
    saved_key,
)

NAMES = ["model.embed_tokens.weight", "model.layers.0.a.weight", "model.layers.0.b.weight", "model.norm.weight"]
KINDS = [gradient_of(1), gradient_of(2), CHANGE]
BFLOAT16 = 2.0**-8


def reference(generator):
    tensors = {kind: [(name, torch.randn(40, 30, generator=generator)) for name in NAMES] for kind in KINDS}
    losses = [[(float(10 * count + step), count) for count in (3, 20, 0, 7)] for step in (1, 2)]
    return Training({LOSS: [10.0, 9.0], NORM: [2.0, 3.0], TOKENS: [30.0, 30.0]}, losses, tensors)


def noisy(training, size, generator, only=None):
    """The same with relative errors of a size, of the tensors of some names."""

    def moved(name, tensor):
        if only is not None and name not in only:
            return tensor
        return tensor + size * torch.randn(tensor.shape, generator=generator)

    tensors = {
        kind: [(name, moved(name, tensor)) for name, tensor in of_kind] for kind, of_kind in training.tensors.items()
    }
    losses = [
        [(total * (1 + size * (-1) ** i), count) for i, (total, count) in enumerate(step)] for step in training.losses
    ]
    return Training(training.scalars, losses, tensors)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


@pytest.fixture
def alone(generator):
    exact = reference(generator)
    return OneRankTrainings(exact, noisy(exact, 1e-6, generator), noisy(exact, 1e-2, generator))


def bounds_of(alone, roundoff=BFLOAT16):
    known = Reference.of(alone.reference, NAMES)
    weights = {name: torch.ones(40, 30) for name in NAMES}
    return known, Bounds.of(alone, known, weights, roundoff)


def test_another_draw_of_the_same_noise_is_within_the_bounds(alone, generator):
    known, bounds = bounds_of(alone)
    for name in NAMES:
        assert bounds.tensors[gradient_of(1), name] == pytest.approx(MARGIN * 1e-2, rel=0.1)
    ranks = [known.distances(noisy(alone.reference, 1e-2, generator).tensors) for _ in range(3)]
    found = compare_tensors(known, bounds, ranks)
    assert [(difference.what, difference.name) for difference in found] == [
        (kind, name) for kind in KINDS for name in NAMES
    ]
    assert all(difference.ok for difference in found)


def test_the_worst_copy_of_a_tensor_counts_and_its_rank_is_named(alone, generator):
    known, bounds = bounds_of(alone)
    sound = known.distances(alone.precision.tensors)
    doubled = [
        (name, tensor * (2 if name == NAMES[2] else 1)) for name, tensor in alone.precision.tensors[gradient_of(2)]
    ]
    ranks = [sound, known.distances(alone.precision.tensors | {gradient_of(2): doubled}), sound]
    (wrong,) = [difference for difference in compare_tensors(known, bounds, ranks) if not difference.ok]
    assert (wrong.what, wrong.name, wrong.rank) == (gradient_of(2), NAMES[2], 1)
    assert wrong.off == pytest.approx(1, rel=0.02) and wrong.ratio == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("spoiled", ["missing", "NaN", "another shape"])
def test_what_is_no_number_and_what_no_rank_has_is_off(alone, spoiled):
    known, bounds = bounds_of(alone)
    tensors = dict(alone.precision.tensors[gradient_of(1)])
    if spoiled == "missing":
        del tensors[NAMES[0]]
    else:
        tensors[NAMES[0]] = torch.full((40, 30), math.nan) if spoiled == "NaN" else torch.ones(40, 29)
    found = compare_tensors(
        known, bounds, [known.distances(alone.precision.tensors | {gradient_of(1): [*tensors.items()]})]
    )
    assert [difference.name for difference in found if not difference.ok] == [NAMES[0]]
    assert found[0].off == math.inf


def test_a_tensor_that_one_rank_has_wrong_too_does_not_widen_its_bound(alone, generator):
    """A kernel of the user's precision that is wrong: one rank and the layout agree with each other."""
    known, _ = bounds_of(alone)
    broken = noisy(alone.precision, 0.9, generator, only=[NAMES[1]])
    _, bounds = bounds_of(OneRankTrainings(alone.reference, alone.reordered, broken))
    found = compare_tensors(known, bounds, [known.distances(broken.tensors)])
    assert {difference.name for difference in found if not difference.ok} == {NAMES[1]}


def test_a_gradient_that_is_nearly_zero_is_no_difference(alone, generator):
    """As that of a bias of keys: nothing but rounding, in whichever order."""
    for training, size in ((alone.reference, 1e-7), (alone.reordered, 1e-7), (alone.precision, 1e-3)):
        named = training.tensors[gradient_of(1)]
        named[3] = NAMES[3], size * torch.randn(30, generator=generator)
    known, bounds = bounds_of(alone)
    other = dict(alone.precision.tensors[gradient_of(1)]) | {NAMES[3]: 1e-3 * torch.randn(30, generator=generator)}
    found = known.distances({gradient_of(1): [*other.items()]})
    assert found[gradient_of(1), NAMES[3]].off <= bounds.tensors[gradient_of(1), NAMES[3]]


def test_scalars_have_bounds_of_their_own(alone):
    _, bounds = bounds_of(alone)
    # Errors of 1e-2, up and down, in the means of micro-batches; the loss is their mean.
    assert bounds.scalars[LOSS, 1] == pytest.approx(MARGIN * 1e-2, rel=0.2)
    assert MARGIN * 1e-4 < bounds.scalars[NORM, 1] < MARGIN * 1e-2
    sound = {LOSS: [10.01, 9.0], NORM: [2.0, 3.0], TOKENS: [30.0, 30.0]}
    assert all(difference.ok for difference in compare_scalars(alone.reference.scalars, sound, bounds, 3))
    for name, value in ((LOSS, 11.0), (NORM, 2.1), (TOKENS, 31.0), (LOSS, math.nan)):
        found = compare_scalars(alone.reference.scalars, sound | {name: [value, sound[name][1]]}, bounds, 3)
        assert [difference.what for difference in found if not difference.ok] == [f"{name} of step 1"]
    # A rank that has logged nothing.
    assert not any(difference.ok for difference in compare_scalars(alone.reference.scalars, {}, bounds, 3))


def test_in_float32_bounds_are_those_of_reordering(alone, generator):
    _, bounds = bounds_of(OneRankTrainings(alone.reference, alone.reordered, alone.reordered), roundoff=2.0**-24)
    assert bounds.tensors[gradient_of(1), NAMES[0]] == pytest.approx(MARGIN * 1e-6, rel=0.1)
    # Weights of 1 hold a change no better than that: 2 steps of 2^-24.
    assert bounds.tensors[CHANGE, NAMES[0]] >= MARGIN * 1e-6
    assert bounds.scalars[LOSS, 1] >= MARGIN * 2.0**-22


def test_a_training_is_what_was_saved(tmp_path, alone):
    alone.reference.save(path := tmp_path / "reference.safetensors", "the key")
    read = Training.load(path)
    assert (read.scalars, saved_key(path)) == (alone.reference.scalars, "the key")
    assert [[tuple(pair) for pair in step] for step in read.losses] == alone.reference.losses
    for kind in KINDS:
        found, expected = dict(read.tensors[kind]), dict(alone.reference.tensors[kind])
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in NAMES)
    path.write_bytes(path.read_bytes()[:50])
    assert saved_key(path) is None and saved_key(tmp_path / "none") is None
