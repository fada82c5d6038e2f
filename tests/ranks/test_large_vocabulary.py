"""A vocabulary of 151,936 tokens: float32 sums keep their precision, on one rank and on eight."""

import pytest
import torch
import torch.distributed as dist
from launching import run_ranks
from loss_definitions import CASES, assert_close_to_truth, truth
from objective_runs import run

VOCAB, ROWS = 151_936, 6
NAMES = ("sft", "dft", "eaft", "label-smoothing", "kd-T2", "target-sft", "deft", "gift")


def draw(dtype, rows=ROWS):
    """Rows between nearly uniform and peaked; half of the labels are likely tokens."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.linspace(0.1, 6, rows)[:, None]
    logits = scale * torch.randn(rows, VOCAB, generator=generator)
    teacher = 0.5 * logits + 2 * torch.randn(rows, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (rows,), generator=generator)
    labels[::2] = logits[::2].argmax(-1)
    return logits.to(dtype), labels, teacher.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_the_definition(name, backend, dtype):
    case = CASES[name]
    logits, labels, teacher = draw(dtype)
    loss, gradient = run(case, logits, labels, teacher, backend=backend)
    expected = truth(case, logits, labels, teacher, torch.ones(ROWS))
    # u = 0.7 z + 0.3 t up to 40: half a step of float32, for each product and for the sum.
    assert_close_to_truth(loss, gradient, expected, 3 * 40 * 2**-24 if name == "target-sft" else 0.0)


def losses_of_shards(names):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    columns = slice(rank * (VOCAB // ranks), (rank + 1) * (VOCAB // ranks))
    logits, labels, teacher = draw(torch.float32)
    results = {}
    for name in names:
        case = CASES[name]
        inputs = case.inputs(logits, labels)
        loss, gradient = run(
            case, logits[:, columns].clone(), labels, teacher[:, columns], inputs=inputs, group=dist.group.WORLD
        )
        results[name] = loss.numpy(), gradient.norm(dim=-1).double().numpy(), gradient.double().sum(-1).numpy()
    return results


@pytest.mark.distributed
@pytest.mark.slow
def test_eight_ranks_give_what_one_gives():
    shards = run_ranks(8, losses_of_shards, [NAMES], timeout=180)
    logits, labels, teacher = draw(torch.float32)
    for name in NAMES:
        case = CASES[name]
        loss, gradient = run(case, logits, labels, teacher)
        for rank, results in enumerate(shards):
            # Only the order of float32 sums within a shard differs.
            torch.testing.assert_close(
                torch.from_numpy(results[name][0]), loss, rtol=1e-6, atol=1e-6, msg=f"{name} {rank}"
            )
        norm = sum(torch.from_numpy(results[name][1]) ** 2 for results in shards).sqrt()
        torch.testing.assert_close(norm, gradient.double().norm(dim=-1), rtol=1e-5, atol=1e-9)
        total = sum(torch.from_numpy(results[name][2]) for results in shards)
        assert (total.abs() < 2e-5).all(), f"{name}: rows sum to {total}"
