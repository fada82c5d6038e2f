"""A frozen second model stacked on the student's pipeline stages.

Student and teacher share every pipeline stage, and the tensor sent to the next one is [s, b, h_student + h_teacher].
The schedule reads the width of that tensor from the model's config and needs no change; the pipeline has no extra
bubble. The teacher hangs outside of the module tree, so DDP, the optimizer and checkpoints never see it.

Cost: the teacher's activations travel with the student's, and so does a zero gradient of their size on the way back;
each rank holds its share of the teacher's weights. It serves every schedule of Megatron's (1F1B, interleaved, no
pipeline), with sequence parallelism, recomputation and either optimizer. What it cannot serve: a teacher that tensor
parallelism of the student's size does not divide, one that does not fit beside the student, and the schedules that take
a model apart into layers (--overlap-moe-expert-parallel-comm). For these the teacher runs forward-only, first, at a
layout of its own: qtarget cache-teacher, then --teacher-cache.
"""

from __future__ import annotations

import contextlib
import copy

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import make_viewless_tensor

from qtarget_megatron.megatron.model.output_head import OutputHead, heads_without_logits
from qtarget_megatron.megatron.model.router import Router
from qtarget_megatron.megatron.model.teacher_cost import TeacherCost


class StackedModel(LanguageModule):
    """A model that carries a frozen teacher stage along; without a teacher it is the class that it is mixed into.

    taught: on a last stage, from the teacher's forward on, which comes first, its output head.
    """

    config: TransformerConfig
    # Whether the model's own forward cuts the mask of padding for sequence parallelism where it embeds tokens.
    cuts_padding_mask: bool

    def __init__(self, *args, teacher: LanguageModule | None = None, teacher_cost: TeacherCost | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        # A plain attribute, not a sub-module: see the module's docstring.
        self.__dict__["teacher"] = teacher
        self.taught: OutputHead | None = None
        self._teacher_cost = teacher_cost or TeacherCost()
        self._student_width = self.config.hidden_size
        if self.mtp_process and self.share_embeddings_and_output_weights and not self.pre_process:
            # The embedding that multi-token prediction brings to the last stage is the head as well. Megatron makes a
            # weight all the same, which nobody would use, and cannot save it.
            self.output_layer.weight = None
        # The routers of all layers with experts, the teacher's included.
        models = [self] if teacher is None else [self, teacher]
        self.routers = [module for model in models for module in model.modules() if isinstance(module, Router)]
        if teacher is not None:
            self._teacher_cost.add_weights(teacher.parameters())
            # The schedule sizes the pipeline's tensors by this config; the layers keep the original one.
            self.config = copy.copy(self.config)
            self.config.hidden_size += teacher.config.hidden_size

    def set_input_tensor(self, input_tensor) -> None:
        stacked = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if self.teacher is None or stacked is None:
            super().set_input_tensor(input_tensor)
            return
        student, teacher = stacked.split([self._student_width, stacked.shape[-1] - self._student_width], dim=-1)
        super().set_input_tensor(student)
        self.teacher.set_input_tensor(teacher.detach().contiguous())

    def forward(
        self,
        input_ids,
        position_ids,
        attention_mask,
        *,
        padding_mask=None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs,
    ):
        """padding_mask: bool [b, s] of the whole sequence on every stage, True where there is padding.
        packed_seq_params: on every stage, where rows are packed: b of them stand one behind another, [1, b s], between
        the stages as the schedule knows them, [s, b, h]."""
        kwargs["padding_mask"] = self._own_part(padding_mask)
        kwargs["packed_seq_params"] = packed_seq_params
        if packed_seq_params is not None and not self.pre_process:
            self.decoder.input_tensor = self.decoder.input_tensor.flatten(0, 1).unsqueeze(1)
        taught = None
        if self.teacher is not None:
            # An evaluation's forwards are not the next step's.
            measured = self._teacher_cost if self.training else contextlib.nullcontext()
            with torch.no_grad(), measured, heads_without_logits(self.teacher) as heads:
                taught = self.teacher(
                    input_ids,
                    position_ids,
                    attention_mask,
                    padding_mask=padding_mask,
                    packed_seq_params=packed_seq_params,
                )
            if self.post_process:
                (self.taught,) = heads
        hidden = super().forward(input_ids, position_ids, attention_mask, **kwargs)
        if self.post_process:
            return hidden
        if packed_seq_params is not None and packed_seq_params.rows > 1:
            hidden = hidden.view(-1, packed_seq_params.rows, hidden.shape[-1])
            if taught is None:
                # The schedule frees what it has sent, and takes no view.
                return make_viewless_tensor(hidden, requires_grad=hidden.requires_grad, keep_graph=True)
        return hidden if taught is None else torch.cat([hidden, taught], dim=-1)

    def take_taught(self) -> OutputHead | None:
        """The teacher's output head of the last forward, which is kept no longer."""
        taught, self.taught = self.taught, None
        return taught

    def _own_part(self, padding_mask):
        """The mask for the model's forward: this rank's part of it, where it does not cut it for sequence parallelism
        itself."""
        is_cut = self.pre_process and self.cuts_padding_mask
        if padding_mask is None or is_cut or not self.config.sequence_parallel:
            return padding_mask
        group = self.pg_collection.tp
        return padding_mask.chunk(group.size(), dim=1)[group.rank()]


class StackedGPTModel(StackedModel, GPTModel):
    cuts_padding_mask = True


class StackedHybridModel(StackedModel, HybridModel):
    """Its checkpoints are those of a GPTModel, see hybrid.py."""

    cuts_padding_mask = False

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Empty, and left out by GPTModel.
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state
