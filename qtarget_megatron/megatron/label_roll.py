"""From one head of multi-token prediction to the next: what belongs to a label goes with it.

Head k predicts at a token the label that stands k tokens further on. Megatron rolls the labels; this rolls, in the same
way, the mask, the side inputs and the second model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import roll_tensor
from torch import Tensor
from torch.distributed import ProcessGroup

from qtarget_megatron import collectives
from qtarget_megatron.loss.sparse_teacher import SparseTeacher
from qtarget_megatron.megatron.head_loss import LossInputs
from qtarget_megatron.megatron.model.output_head import OutputHead


class LabelRoll:
    """One token further, along sequences as Megatron cuts and packs them.

    Only the mask ends with each sample. What stands at tokens behind its last label is that of others, and never read.
    """

    def __init__(self, packed: PackedSeqParams | None, cp_group: ProcessGroup, layer: Any):
        """layer: the output layer, which knows of sequence parallelism."""
        self._packed, self._layer = packed, layer
        # Without context parallelism all of a sequence is here, and nothing has to wait for the edges of its samples.
        self._cp_group = cp_group if collectives.size(cp_group) > 1 else None

    def mask(self, mask: Tensor) -> Tensor:
        """[b, s], 0 where no label is that far on in the sample."""
        if self._cp_group is not None:
            return self._among_ranks(mask)
        return mask.roll(-1, 1).masked_fill(self._last(mask), 0)

    def inputs(self, inputs: LossInputs) -> LossInputs:
        """Those of a head for the next one."""
        kept = inputs.sparse_teacher
        if kept is not None:
            ids, log_p, tail = (self._values(values) for values in (kept.ids, kept.log_p, kept.tail))
            kept = SparseTeacher(ids, log_p, tail, kept.rule)
        counts, samples = inputs.num_supervised, inputs.samples
        return replace(
            inputs,
            samples=None if samples is None else replace(samples, ids=self._values(samples.ids)),
            token_inputs={name: self._values(values) for name, values in inputs.token_inputs.items()},
            sparse_teacher=kept,
            teacher=lambda: self._head(inputs.teacher()),
            num_supervised=None if counts is None else counts[1:],
        )

    def _head(self, head: OutputHead | None) -> OutputHead | None:
        return None if head is None else replace(head, hidden=self._hidden(head.hidden))

    def _values(self, values: Tensor) -> Tensor:
        """[b, s, ...]"""
        return values.roll(-1, 1) if self._cp_group is None else self._among_ranks(values)

    def _hidden(self, hidden: Tensor) -> Tensor:
        """[s, b, h], or a rank's part of it under sequence parallelism."""
        group = self._layer.tp_group if self._layer.sequence_parallel else None
        rank, ranks = collectives.rank(group), collectives.size(group)
        if self._cp_group is None:
            first = collectives.gather_sequence(hidden[:1], group)[(rank + 1) % ranks]
            return torch.cat([hidden[1:], first[None]])
        whole = collectives.gather_sequence(hidden, group)
        return self._among_ranks(whole.transpose(0, 1)).transpose(0, 1).chunk(ranks)[rank].contiguous()

    def _among_ranks(self, values: Tensor) -> Tensor:
        """[b, s, ...], of which each rank of context parallelism has its chunks."""
        packed = self._packed
        rolled, _ = roll_tensor(values.movedim(1, -1), dims=-1, cp_group=self._cp_group, packed_seq_params=packed)
        return rolled.movedim(-1, 1)

    def _last(self, mask: Tensor) -> Tensor:
        """bool [s], True at the last token of each sample."""
        begins = torch.zeros(mask.shape[1] + 1, dtype=torch.bool, device=mask.device)
        begins[-1:].fill_(True)
        if self._packed is not None:
            begins.index_fill_(0, self._packed.cu_seqlens_q.long(), True)
        return begins[1:]
