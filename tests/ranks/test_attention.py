"""The local layers' attention against the definition, in float64 with every score written out."""

import math

import pytest
import torch
from launching import run_ranks

pytestmark = [pytest.mark.distributed]

# heads, groups, width of queries and keys, width of values, window to the left (None: none), length
SHAPES = {
    "one head": (1, 1, 8, 8, None, 17),
    "grouped queries": (6, 2, 16, 16, None, 40),
    "one group": (4, 1, 8, 8, None, 33),
    "a window": (4, 2, 8, 8, 5, 64),
    "a window as wide as the sequence": (4, 4, 8, 8, 63, 64),
    "a window over several blocks": (2, 2, 8, 8, 100, 1200),
    "a window of the token itself": (2, 1, 8, 8, 0, 24),
    "narrow values": (3, 3, 24, 16, None, 48),
    "a single token": (2, 1, 8, 8, None, 1),
    "sinks, grouped queries": (6, 2, 16, 16, None, 40),
    "sinks, a window": (4, 2, 8, 8, 5, 64),
    "sinks, a window over several blocks": (2, 2, 8, 8, 100, 1200),
    "sinks, narrow values": (3, 3, 24, 16, None, 48),
    "sinks, a window of the token itself": (2, 1, 8, 8, 0, 24),
    "sinks, a single token": (2, 1, 8, 8, None, 1),
}
# In float32: of sums of up to 1,200 products; the reference is in float64.
CLOSE = dict(rtol=2e-5, atol=2e-6)


def definition(query, key, value, sinks, scale, window):
    """[s, b, heads d_v] in float64, of one sample a row; sinks: another score of each head, with no value."""
    query, key, value, sinks = (x.double() for x in (query, key, value, sinks))
    share = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(share, 2), value.repeat_interleave(share, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * scale
    i, j = torch.arange(len(query))[:, None], torch.arange(len(key))[None]
    seen = (j <= i) & (i - j <= (len(query) if window is None else window))
    scores = scores.masked_fill(~seen, -torch.inf)
    if len(sinks):
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : len(key)]
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def layer(shape, context=1, **changes):
    """The layer's attention as a function of queries, keys, values and sinks (none: no sinks)."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from qtarget_megatron.megatron.model.attention import LocalAttention

    heads, groups, width, value_width, window, _ = shape
    settings = dict(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
        context_parallel_size=context,
        window_size=None if window is None else (window, 0),
        cp_comm_type="p2p" if context > 1 else None,
    )
    core = LocalAttention(
        TransformerConfig(**(settings | changes)),
        1,
        AttnMaskType.causal,
        "self",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"]),
        k_channels=width,
        v_channels=value_width,
    )

    def attend(query, key, value, sinks, **how):
        if not len(sinks):
            return core(query, key, value, None, **how)
        return torch.func.functional_call(core, {"softmax_offset": sinks}, (query, key, value, None), how)

    attend.core = core
    return attend


def draw(name, batch=2, length=None):
    """Queries, keys, values, sinks, and the gradient of the output."""
    heads, groups, width, value_width, _, longest = SHAPES[name]
    length = length or longest
    generator = torch.Generator().manual_seed(7)
    sizes = ((heads, width), (groups, width), (groups, value_width))
    tensors = [torch.randn(length, batch, *size, generator=generator) for size in sizes]
    sinks = torch.randn(heads if name.startswith("sinks") else 0, generator=generator)
    return [*tensors, sinks, torch.randn(length, batch, heads * value_width, generator=generator)]


def results(compute, tensors, upstream):
    """The output and the gradients, 0 of sinks that are not there."""
    inputs = [x.detach().clone().requires_grad_() for x in tensors]
    out = compute(*inputs)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)]


def kind(name):
    return dict(softmax_type="learnable") if name.startswith("sinks") else {}


def initialize(context=1):
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(context_parallel_size=context)
        tensor_parallel.model_parallel_cuda_manual_seed(1)


def whole_rows():
    initialize()
    for name, shape in SHAPES.items():
        *tensors, upstream = draw(name)
        scale = 1 / math.sqrt(shape[2])
        expected = results(lambda *x, s=shape, c=scale: definition(*x, c, s[4]), tensors, upstream)
        for got, want in zip(results(layer(shape, **kind(name)), tensors, upstream), expected, strict=True):
            torch.testing.assert_close(got.double(), want.double(), **CLOSE, msg=lambda text, n=name: f"{n}: {text}")


def test_whole_rows():
    run_ranks(1, whole_rows, megatron=True)


LENGTHS = [5, 40, 1, 17, 65]


def packed_rows():
    """Each sample of a row sees itself alone."""
    from megatron.core.packed_seq_params import PackedSeqParams

    initialize()
    edges = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges, max_seqlen_q=65)
    for name, shape in SHAPES.items():
        *tensors, upstream = draw(name, batch=1, length=sum(LENGTHS))
        attend, scale = layer(shape, **kind(name)), 1 / math.sqrt(shape[2])

        def packed_row(*x, attend=attend):
            *parts, sinks = x
            return attend(*(part.squeeze(1) for part in parts), sinks, packed_seq_params=packed).unsqueeze(1)

        def one_by_one(*x, window=shape[4], scale=scale):
            *parts, sinks = x
            rows = zip(*(part.split(LENGTHS) for part in parts), strict=True)
            return torch.cat([definition(*row, sinks, scale, window) for row in rows])

        expected = results(one_by_one, tensors, upstream)
        for got, want in zip(results(packed_row, tensors, upstream), expected, strict=True):
            torch.testing.assert_close(got.double(), want.double(), **CLOSE)


def test_packed_rows():
    run_ranks(1, packed_rows, megatron=True)


def shared_rows(ranks):
    """Under context parallelism this rank has chunks r and 2 C - 1 - r of the sequence."""
    from megatron.core import parallel_state

    initialize(ranks)
    rank = parallel_state.get_context_parallel_rank()
    for name, shape in SHAPES.items():
        scale, chunk = 1 / math.sqrt(shape[2]), -(-shape[5] // (2 * ranks))
        *tensors, sinks, upstream = draw(name, length=2 * ranks * chunk)
        at = torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in (rank, 2 * ranks - 1 - rank)])
        expected = results(lambda *x, s=shape, c=scale: definition(*x, c, s[4]), [*tensors, sinks], upstream)
        attend = layer(shape, ranks, **kind(name))
        *found, of_sinks = results(attend, [*(x[at] for x in tensors), sinks], upstream[at])
        # Each rank has its tokens' part, as of every parameter.
        torch.distributed.all_reduce(of_sinks, group=parallel_state.get_context_parallel_group())
        close = CLOSE | {"msg": lambda text, n=name: f"{n}: {text}"}
        torch.testing.assert_close(of_sinks.double(), expected.pop().double(), **close)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got.double(), want[at].double(), **close)


@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallel_ranks_share_a_row(ranks):
    run_ranks(ranks, shared_rows, (ranks,), megatron=True)


def largest_allocation():
    """Bytes of the largest tensor made in forward and backward, at several shapes."""
    from torch.profiler import ProfilerActivity, profile

    initialize()
    found = {}
    for name in ("grouped queries", "a window", "narrow values", "sinks, grouped queries", "sinks, a window"):
        *tensors, upstream = draw(name, batch=1, length=4096)
        attend = layer(SHAPES[name], **kind(name))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            results(attend, tensors, upstream)
        found[name] = max(event.self_cpu_memory_usage for event in profiled.events())
    return found


def test_no_matrix_of_scores_is_made():
    (found,) = run_ranks(1, largest_allocation, megatron=True)
    for name, nbytes in found.items():
        heads, _, width, *_ = SHAPES[name]
        # A mask of booleans would have 4096^2 bytes, scores of one head in float32 four times that.
        assert nbytes < 4096**2 // 2, name
        assert nbytes >= 4096 * heads * width * 4, "the profiler has seen the outputs"


def dropped():
    """Dropout draws in training alone, and other probabilities each time."""
    initialize()
    name = "grouped queries"
    *tensors, _ = draw(name)
    attend = layer(SHAPES[name], attention_dropout=0.5)
    first, second = attend(*tensors), attend(*tensors)
    attend.core.eval()
    still = attend(*tensors)
    torch.testing.assert_close(still.double(), definition(*tensors, 0.25, None), **CLOSE)
    return bool((first != second).any() and (first != still).any())


def refusals():
    initialize()
    told = []
    for changes in ({"softmax_type": "off-by-one"}, {"window_size": (4, 4)}):
        try:
            layer(SHAPES["one head"], **changes)
        except ValueError as error:
            told.append(str(error))
    return told


def test_dropout_and_what_it_does_not_serve():
    assert run_ranks(1, dropped, megatron=True) == [True]
    assert run_ranks(1, refusals, megatron=True) == [
        [
            "sinks are learnt or absent in local layers, got --softmax-type off-by-one",
            "a causal window has no tokens to the right, got --window-size 4,4",
        ]
    ]
