"""The loss over real ranks: the same numbers as unsharded, one collective, bitwise agreement.

Every case of a world size runs in one launch; each is a test of its own, named after the case.
"""

import math
import traceback
import zlib
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from launching import run_ranks
from loss_definitions import CASES, assert_close_to_truth, truth

from qtarget_megatron import qtarget_cross_entropy

pytestmark = pytest.mark.distributed

WORLD_SIZES = (2, 3, 4)
ROWS = 13
# torch 2.13 gives them other names.
GATHER_INTO = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_INTO = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
COLLECTIVES = (
    f"all_gather {GATHER_INTO} all_gather_object all_reduce all_to_all all_to_all_single "
    f"barrier broadcast broadcast_object_list gather reduce reduce_scatter {REDUCE_INTO} "
    "scatter send recv isend irecv batch_isend_irecv"
).split()


@dataclass(frozen=True)
class Inputs:
    """Whole rows, as the unsharded loss takes them."""

    logits: torch.Tensor
    labels: torch.Tensor
    teacher: torch.Tensor
    upstream: torch.Tensor
    vocab_size: int


# ---- layouts: what the shards of V_local columns hold; T is the number of ranks


def odd_padded(draw, ranks, columns):
    """Labels anywhere, a quarter ignored, the last shard partly padding."""
    return draw(ranks * columns - 5)


def last_shard_all_padding(draw, ranks, columns):
    return draw((ranks - 1) * columns)


def padding_from_within_the_first_shard(draw, ranks, columns):
    return draw(columns // 2)


def labels_on_one_shard(draw, ranks, columns):
    inputs = draw(ranks * columns)
    inputs.labels[:] = (ranks - 1) * columns + inputs.labels % columns
    return inputs


def labels_on_every_shard(draw, ranks, columns):
    inputs = draw(ranks * columns)
    shard = torch.arange(ROWS) % ranks
    inputs.labels[:] = shard * columns + inputs.labels % columns
    # The first and the last column of a shard.
    inputs.labels[:ranks] = torch.arange(ranks) * columns
    inputs.labels[ranks : 2 * ranks] = torch.arange(1, ranks + 1) * columns - 1
    return inputs


def nan_on_ignored_tokens(draw, ranks, columns):
    inputs = draw(ranks * columns)
    inputs.labels[::3] = -100
    for matrix in (inputs.logits, inputs.teacher):
        matrix[::3, columns : columns + 2] = torch.tensor([math.nan, math.inf])
    inputs.upstream[0] = math.nan
    return inputs


def nothing_supervised(draw, ranks, columns):
    inputs = draw(ranks * columns)
    inputs.labels[:] = -100
    return inputs


def nan_on_one_shard(draw, ranks, columns):
    inputs = draw(ranks * columns)
    inputs.labels[4:6] = torch.tensor([0, columns])
    inputs.logits[4:6, columns + 1] = torch.tensor([math.nan, math.inf])
    return inputs


def offset_on_one_shard(draw, ranks, columns):
    inputs = draw(ranks * columns)
    inputs.logits[:, columns : 2 * columns] += 1e4
    inputs.teacher[:, :columns] += 1e4
    return inputs


def negative_offset_on_one_shard(draw, ranks, columns):
    inputs = draw(ranks * columns)
    inputs.logits[:, :columns] -= 1e4
    inputs.teacher[:, :columns] -= 1e4
    inputs.labels[:] = columns + inputs.labels % ((ranks - 1) * columns)
    return inputs


def one_shard_of_minus_infinity(draw, ranks, columns):
    """Losses are infinite where a target has mass there; gradients are finite."""
    inputs = draw(ranks * columns)
    inputs.logits[:, columns : 2 * columns] = -math.inf
    return inputs


LAYOUTS = {
    layout.__name__: layout
    for layout in (
        odd_padded,
        last_shard_all_padding,
        padding_from_within_the_first_shard,
        labels_on_one_shard,
        labels_on_every_shard,
        nan_on_ignored_tokens,
        nothing_supervised,
        nan_on_one_shard,
        offset_on_one_shard,
        negative_offset_on_one_shard,
        one_shard_of_minus_infinity,
    )
}
# One without a residual, with one that reads only the student, with two, and with both models.
TYPICAL = ("sft", "label-smoothing", "kd-T2", "target-sft", "target-sft-eta1", "eaft-k50", "deft", "gift")
TYPICAL += ("reverse-kl", "jsd", "total-variation")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def case_names(world_size: int) -> list[str]:
    """objective/dtype/backend/layout, and /strided-groups where the group is {0, 2} or {1, 3}."""
    names = []
    for backend in ("reference", "cpp"):
        for dtype in DTYPES:
            names += [f"{o}/{dtype}/{backend}/odd_padded" for o in CASES]
        for layout in LAYOUTS:
            if layout != "odd_padded":
                names += [f"{o}/float32/{backend}/{layout}" for o in TYPICAL]
    names += [f"{o}/float64/reference/odd_padded" for o in TYPICAL]
    if world_size == 4:
        names += [f"{o}/float32/cpp/labels_on_every_shard/strided-groups" for o in TYPICAL]
    return names


# ---- what every rank runs


def run_all(names: list[str]) -> dict[str, str]:
    """Run the cases; what is wrong by case name, empty where all is well."""
    strided = [dist.new_group([0, 2]), dist.new_group([1, 3])] if dist.get_world_size() == 4 else []
    outcomes = {}
    for name in names:
        on_strided = name.endswith("/strided-groups")
        group = strided[dist.get_rank() % 2] if on_strided else dist.group.WORLD
        outcomes[name] = _outcome(name, group)
    return outcomes


def _outcome(name: str, group) -> str:
    # An assertion fails after the last collective of its case, so that the ranks stay in step;
    # anything else ends the launch, with the name of the case.
    try:
        return _check(name, group)
    except Exception as error:
        raise RuntimeError(f"case {name}: {error}") from error


def _check(name: str, group) -> str:
    objective_name, dtype, backend, layout = name.split("/")[:4]
    case = CASES[objective_name]
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    columns = 31  # odd: row strides are not multiples of 16 bytes
    inputs = _inputs(name, layout, ranks, columns, DTYPES.get(dtype, torch.float64))
    whole = _run(case, inputs, slice(None), None, backend)
    mine = slice(rank * columns, (rank + 1) * columns)
    with _Recorder() as collectives:
        loss, gradient, statistics = _run(case, inputs, mine, group, backend, collectives)
    losses = [torch.empty_like(loss) for _ in range(ranks)]
    dist.all_gather(losses, loss, group=group)
    gradients = [torch.empty_like(gradient) for _ in range(ranks)]
    dist.all_gather(gradients, gradient, group=group)
    try:
        assert collectives.forward == [GATHER_INTO] * (1 + case.objective.request.second_pass)
        assert collectives.backward == []
        for other in losses:
            assert _bits(other) == _bits(loss), "the loss differs between ranks"
        # Where the models' offsets differ from shard to shard, log p - log r is their size, and rounded at it.
        of_log_ratio = 2e4 * 2**-23 * 4 if case.objective.request.reverse_cross and "offset" in layout else 0.0
        _compare_with_unsharded(loss, torch.cat(gradients, -1), statistics, *whole, of_log_ratio)
        if layout in ("odd_padded", "labels_on_one_shard", "labels_on_every_shard"):
            expected = truth(
                case,
                inputs.logits,
                inputs.labels,
                inputs.teacher,
                inputs.upstream,
                inputs.vocab_size,
            )
            assert_close_to_truth(loss, torch.cat(gradients, -1), expected)
    except AssertionError:
        return traceback.format_exc(limit=-2)
    return ""


def _inputs(name: str, layout: str, ranks: int, columns: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    total = ranks * columns

    def draw(vocab_size: int) -> Inputs:
        logits = 3 * torch.randn(ROWS, total, generator=generator)
        teacher = 0.5 * logits + 2 * torch.randn(ROWS, total, generator=generator)
        labels = torch.randint(vocab_size, (ROWS,), generator=generator)
        if layout == "odd_padded":
            labels[::4] = -100
        logits[:, vocab_size:], teacher[:, vocab_size:] = math.nan, 1e30
        upstream = torch.randn(ROWS, generator=generator)
        return Inputs(logits.to(dtype), labels, teacher.to(dtype), upstream, vocab_size)

    return LAYOUTS[layout](draw, ranks, columns)


def _run(case, inputs: Inputs, columns: slice, group, backend: str, collectives=None):
    leaf = inputs.logits[:, columns].requires_grad_()
    loss, statistics = qtarget_cross_entropy(
        leaf,
        inputs.labels,
        objective=case.objective,
        teacher_logits=case.teacher(inputs.teacher[:, columns]),
        token_inputs=case.inputs(inputs.logits, inputs.labels, inputs.vocab_size),
        samples=case.samples(inputs.labels),
        group=group,
        vocab_size=inputs.vocab_size,
        backend=backend,
        return_statistics=True,
    )
    if collectives is not None:
        collectives.calls = collectives.backward
    (gradient,) = torch.autograd.grad(loss, leaf, inputs.upstream.to(loss.dtype))
    return loss.detach(), gradient, statistics


def _compare_with_unsharded(loss, gradient, statistics, whole_loss, whole_gradient, whole_statistics, rounding) -> None:
    """Only the order of float32 sums differs: some units in the last place of the loss (1e-6) and
    of the terms of a gradient row (1e-6 of it and 2^-22 of its masses, which are at most 2 here,
    times |upstream| < 4), and rounding. A bfloat16 element may round to either neighbour (2^-7)."""
    tolerance = 1e-12 if gradient.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        loss, whole_loss, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"loss: {m}"
    )
    for name in ("log_p", "p", "entropy", "collision", "top_logits", "label_mass", "residual_mass", "trust"):
        if getattr(whole_statistics, name) is None:
            assert getattr(statistics, name) is None
            continue
        torch.testing.assert_close(
            getattr(statistics, name),
            getattr(whole_statistics, name),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    exact, relative = gradient.double(), 2**-7 if gradient.dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(
        exact,
        whole_gradient.double(),
        rtol=relative,
        atol=1e-14 if gradient.dtype == torch.float64 else 2**-22 * 8 + rounding,
        equal_nan=True,
        msg=lambda m: f"gradient: {m}",
    )


def _bits(loss: torch.Tensor) -> bytes:
    return loss.numpy().tobytes()


class _Recorder:
    """Records the names of the collectives called through torch.distributed."""

    def __enter__(self):
        self.forward, self.backward = [], []
        self.calls = self.forward
        self._originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, function in self._originals.items():
            setattr(dist, name, self._recording(name, function))
        return self

    def _recording(self, name, function):
        def call(*args, **kwargs):
            self.calls.append(name)
            return function(*args, **kwargs)

        return call

    def __exit__(self, *exception):
        for name, function in self._originals.items():
            setattr(dist, name, function)


# ---- the tests


@pytest.fixture(scope="module")
def outcomes():
    """World size -> what each rank found, by case name: one launch each, at first use."""
    launches = {}

    def of(world_size: int) -> list[dict[str, str]]:
        if world_size not in launches:
            names = case_names(world_size)
            launches[world_size] = run_ranks(world_size, run_all, [names], timeout=120)
        return launches[world_size]

    return of


PAYLOADS = {
    "sft": 4, "dft": 4, "psft-data": 4, "psft": 8, "label-smoothing": 7, "target-sft": 7, "gem": 7, "kd": 8,
    "kd-T2": 12, "asft": 8, "gift": 8, "deft": 5, "eaft": 24, "eaft-k3": 7, "entropy-mask": 4, "reverse-kl": 8,
    "mixed-kl": 9, "jsd": 7, "total-variation": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_collective_carries_what_the_objective_asks_for(name):
    """Numbers per token and rank: m, s, e, z_y; three for a residual; one for each thing that is requested.

    Most divergences have a second collective, of two numbers.
    """
    case, sent = CASES[name], []
    logits, labels = torch.randn(5, 40), torch.randint(40, (5,))

    def recording(partials, group):
        sent.append(partials.shape)
        return partials[None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtarget_megatron.collectives.gather_partials", recording)
        inputs = case.inputs(logits, labels)
        qtarget_cross_entropy(
            logits, labels, objective=case.objective, teacher_logits=case.teacher(logits), token_inputs=inputs
        )
    assert sent == [(5, PAYLOADS[name]), (5, 2)][: 1 + case.objective.request.second_pass]


@pytest.mark.parametrize(("world_size", "name"), [(size, name) for size in WORLD_SIZES for name in case_names(size)])
def test_sharded_is_unsharded(world_size, name, outcomes):
    for rank, outcome in enumerate(outcomes(world_size)):
        assert not outcome[name], f"rank {rank} of {world_size}: {outcome[name]}"
