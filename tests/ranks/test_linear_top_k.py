"""The most likely tokens of a sharded output layer: against a stable sort of all logits, ties and padding included."""

import itertools

import pytest
import torch
from launching import run_ranks

from qtarget_megatron.loss.linear_top_k import TopTokens, linear_top_k

V = 37


def matrices(dtype, *, ties, n=9, vocab=V):
    """hidden [n, 8] and weight [vocab, 8]; ties: small whole numbers, so that many logits are equal, in any order of
    summation."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(rows, 8, generator=generator) for rows in (n, vocab))
    if ties:
        hidden, weight = (2 * hidden).round(), weight.round()
    return hidden.to(dtype), weight.to(dtype)


def by_sorting(hidden, weight, k, top_p=None):
    """The definition, in float64 from the logits of the dtype: all tokens in order, then their running mass."""
    logits = (hidden @ weight.t()).double()
    order = sorted_ids(logits)
    log_p = logits.log_softmax(-1).gather(1, order)
    ids, counts, tails = order[:, :k], [], []
    for row in log_p.exp():
        running = list(itertools.accumulate(row.tolist()))[:k]
        counts.append(next((i + 1 for i, mass in enumerate(running) if top_p is not None and mass >= top_p), k))
        tails.append(row[counts[-1] :].sum().item())
    return ids, log_p[:, :k], torch.tensor(counts), torch.tensor(tails, dtype=torch.float64)


def sorted_ids(logits):
    rows = [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i)) for row in logits.tolist()]
    return torch.tensor(rows)


def assert_same(found, expected):
    ids, log_p, counts, tail = expected
    torch.testing.assert_close(found.ids, ids, rtol=0, atol=0)
    torch.testing.assert_close(found.log_p, log_p, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.counts, counts, rtol=0, atol=0)
    torch.testing.assert_close(found.tail, tail, rtol=0, atol=1e-6)


CASES = [
    (dtype, ties, k, top_p)
    for dtype in (torch.float32, torch.bfloat16)
    for ties in (False, True)
    for k, top_p in ((1, None), (5, None), (12, 0.8), (V, None), (V, 0.95), (3, 1e-9))
]


@pytest.mark.parametrize(("dtype", "ties", "k", "top_p"), CASES)
@pytest.mark.parametrize("chunk_size", [4, 512])
def test_one_rank_finds_what_sorting_finds(dtype, ties, k, top_p, chunk_size):
    hidden, weight = matrices(dtype, ties=ties)
    found = linear_top_k(hidden, weight, k, top_p=top_p, chunk_size=chunk_size)
    assert_same(found, by_sorting(hidden, weight, k, top_p))


def test_the_cases_have_ties_at_the_last_place():
    hidden, weight = matrices(torch.float32, ties=True)
    logits = (hidden @ weight.t()).sort(-1, descending=True).values
    assert (logits[:, 4] == logits[:, 5]).any() and (logits[:, 11] == logits[:, 12]).any()
    assert (logits == 0).any() and (logits < 0).any()


def test_padding_columns_have_no_mass():
    hidden, weight = matrices(torch.float32, ties=False, vocab=V + 6)
    weight[V:] = 100 * hidden[0]  # the largest logits
    assert_same(linear_top_k(hidden, weight, 5, vocab_size=V), by_sorting(hidden, weight[:V], 5))


def test_masked_tokens_come_last():
    found = linear_top_k(torch.ones(1, 1), torch.tensor([[1.0], [-torch.inf], [2.0], [-torch.inf]]), 4)
    assert found.ids.tolist() == [[2, 0, 1, 3]] and found.log_p[0, 2:].tolist() == [-torch.inf] * 2
    assert found.tail.item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_logits_show_in_their_row_only(bad):
    hidden, weight = matrices(torch.float32, ties=False)
    expected = by_sorting(hidden, weight, 4)
    hidden[3, 0] = bad
    found = linear_top_k(hidden, weight, 4)
    broken = torch.arange(len(hidden)) == 3
    assert found.tail[3].isnan() and not found.log_p[3].isfinite().all()
    torch.testing.assert_close(found.ids[~broken], expected[0][~broken])
    torch.testing.assert_close(found.tail[~broken], expected[3][~broken], rtol=0, atol=1e-6)


def test_no_tokens_give_no_rows():
    found = linear_top_k(torch.empty(0, 8), torch.randn(V, 8), 5)
    assert found.ids.shape == found.log_p.shape == (0, 5) and found.counts.shape == found.tail.shape == (0,)


@pytest.mark.parametrize(("k", "vocab_size"), [(0, None), (V + 1, None), (31, 30), (5, V + 1), (5, 0)])
def test_impossible_sizes_are_refused(k, vocab_size):
    with pytest.raises(ValueError, match="expected|must be"):
        linear_top_k(torch.randn(2, 8), torch.randn(V, 8), k, vocab_size=vocab_size)


def sharded(rank_vocab):
    """On each rank: every case, with this many rows of the weight on each rank."""
    rank = torch.distributed.get_rank()
    results = []
    for dtype, ties, k, top_p in CASES:
        hidden, weight = matrices(dtype, ties=ties)
        padded = torch.nn.functional.pad(weight, (0, 0, 0, 3 * rank_vocab - V), value=9.0)
        mine = padded[rank * rank_vocab :][:rank_vocab]
        group = torch.distributed.group.WORLD
        found = linear_top_k(hidden, mine, k, top_p=top_p, group=group, vocab_size=V, chunk_size=4)
        results.append({name: value.numpy() for name, value in vars(found).items()})
    empty = linear_top_k(hidden[:0], mine, 2, group=group, vocab_size=V)
    return results, tuple(empty.ids.shape)


@pytest.mark.distributed
@pytest.mark.parametrize("rank_vocab", [13, 19])  # 19: the last rank has padding only
def test_three_ranks_find_the_same(rank_vocab):
    ranks = run_ranks(3, sharded, (rank_vocab,))
    for number, (dtype, ties, k, top_p) in enumerate(CASES):
        expected = by_sorting(*matrices(dtype, ties=ties), k, top_p)
        for results, empty in ranks:
            found = TopTokens(**{name: torch.from_numpy(value) for name, value in results[number].items()})
            assert_same(found, expected)
            assert (found.log_p.numpy() == ranks[0][0][number]["log_p"]).all(), "bitwise equal on every rank"
            assert empty == (0, 2)
