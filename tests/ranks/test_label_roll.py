"""What belongs to a label goes with it as Megatron rolls labels: whole rows, packed ones, context parallelism."""

import pytest
import torch
import torch.distributed as dist
from launching import run_ranks
from megatron_reset import reset

from qtarget_megatron import SparseTeacher

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

ROWS, LENGTH, WIDTH, AHEAD = 2, 24, 3, 3
# Lengths of the samples in two packed rows; one is a single token where no rank has to cut it.
SAMPLES = {1: [1, 9, 14, 20, 4], 2: [4, 8, 12, 16, 8]}


class Layer:
    """What a roll asks of an output layer."""

    def __init__(self, tp_group, sequence_parallel):
        self.tp_group, self.sequence_parallel = tp_group, sequence_parallel


def cases():
    """Rows, edges of samples in a row one behind another, or None where a row is one sample."""
    return {"whole": (ROWS, LENGTH, None), "packed": (1, ROWS * LENGTH, True)}


def rolled(context_parallel):
    """Whether everything is where the definition has it, by case and by how many tokens further on."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    from qtarget_megatron.megatron.head_loss import LossInputs
    from qtarget_megatron.megatron.label_roll import LabelRoll
    from qtarget_megatron.megatron.model.context_parallel import own_tokens
    from qtarget_megatron.megatron.model.output_head import OutputHead

    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(
        1 if context_parallel else ranks, context_parallel_size=ranks if context_parallel else 1
    )
    tp, cp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
    layer, found = Layer(tp, not context_parallel and ranks > 1), {}
    for name, (rows, length, is_packed) in cases().items():
        ends = torch.tensor([0, *SAMPLES[cp.size()]]).cumsum(0) if is_packed else torch.tensor([0, length])
        edges = list(zip(ends.tolist(), ends.tolist()[1:], strict=False))
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends.int()) if is_packed else None
        draw = torch.Generator().manual_seed(3)
        mask = (torch.rand(rows, length, generator=draw) < 0.8).float()
        labels = torch.randint(1, 99, (rows, length), generator=draw)
        weight, log_p = torch.rand(rows, length, generator=draw), torch.rand(rows, length, 4, generator=draw)
        hidden = torch.rand(length, rows, WIDTH, generator=draw)
        own = own_tokens(edges, cp.rank(), cp.size()) if cp.size() > 1 else torch.arange(length)
        part = slice(None) if not layer.sequence_parallel else slice(*_share(length, tp))
        kept = SparseTeacher(labels[:, own, None].expand(-1, -1, 4), log_p[:, own], weight[:, own], "uniform")
        head = OutputHead(hidden[own][part], layer, None)
        inputs = LossInputs({"weight": weight[:, own]}, kept, lambda head=head: head, (9, 8, 7, 6))
        roll, now, megatrons = LabelRoll(packed, cp, layer), mask[:, own], labels[:, own]
        for ahead in range(1, AHEAD + 1):
            now, inputs = roll.mask(now), roll.inputs(inputs)
            megatrons, _ = roll_tensor(megatrons, cp_group=cp, packed_seq_params=packed)
            place = torch.arange(length)
            end = torch.tensor([next(end for begin, end in edges if begin <= at < end) for at in place.tolist()])
            known, source = place + ahead < end, (place + ahead).clamp(max=length - 1)
            expected = torch.where(known, mask[:, source], 0)[:, own]
            at = known[own]
            found[name, ahead] = [
                torch.equal(now, expected),
                torch.equal(megatrons[:, at], labels[:, source][:, own][:, at]) and not megatrons[:, ~at].any(),
                torch.equal(inputs.token_inputs["weight"][:, at], weight[:, source][:, own][:, at]),
                torch.equal(inputs.sparse_teacher.log_p[:, at], log_p[:, source][:, own][:, at]),
                torch.equal(inputs.sparse_teacher.ids[:, at, 0], labels[:, source][:, own][:, at]),
                torch.equal(inputs.sparse_teacher.tail[:, at], weight[:, source][:, own][:, at]),
                torch.equal(inputs.teacher().hidden[at[part]], hidden[source][own][part][at[part]]),
                inputs.num_supervised == (9, 8, 7, 6)[ahead:],
            ]
    reset()
    return found


def _share(length, group):
    size = length // group.size()
    return group.rank() * size, (group.rank() + 1) * size


def every_layout():
    return {context_parallel: rolled(context_parallel) for context_parallel in (False, True)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_everything_is_rolled_as_megatron_rolls_labels(ranks):
    for found in run_ranks(ranks, every_layout, megatron=True):
        for context_parallel, of_cases in found.items():
            assert len(of_cases) == 2 * AHEAD
            for case, right in of_cases.items():
                assert all(right), (context_parallel, case, right)
