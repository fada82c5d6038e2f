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

A model with adapters can be its own teacher, with the adapters off: what the pipeline sends is twice as wide, and no
second weights are anywhere.
"""

from __future__ import annotations

import contextlib
import copy
import functools

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import make_viewless_tensor

from qtarget_megatron.megatron.model.lora import Adapters
from qtarget_megatron.megatron.model.output_head import OutputHead, heads_without_logits, replaced
from qtarget_megatron.megatron.model.router import Router
from qtarget_megatron.megatron.model.teacher_cost import TeacherCost

# What names of the teacher's weights in checkpoints begin with.
_TEACHER = "teacher."


class StackedModel(LanguageModule):
    """A model that carries a frozen teacher stage along; without a teacher it is the class that it is mixed into.

    taught:   on a last stage, from the teacher's forward on, which comes first, its output head.
    adapters: where the model is frozen, what is trained; its checkpoints hold them alone.
    keeps_teacher:    its checkpoints hold the teacher's weights as well, which are the model's own of an earlier step.
    teacher_is_known: whether the teacher has weights.
    """

    config: TransformerConfig
    # Whether the model's own forward cuts the mask of padding for sequence parallelism where it embeds tokens.
    cuts_padding_mask: bool

    def __init__(
        self,
        *args,
        teacher: LanguageModule | None = None,
        teaches_itself: bool = False,
        teacher_cost: TeacherCost | None = None,
        **kwargs,
    ):
        """teaches_itself: the teacher is the model without its adapters, which are to be there before a forward."""
        super().__init__(*args, **kwargs)
        self.adapters: Adapters | None = None
        self._teaches_itself, self._teacher_input = teaches_itself, None
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
            self._teacher_cost.add_model(teacher, self)
        self._has_teacher = teaches_itself or teacher is not None
        self.keeps_teacher, self.teacher_is_known = False, True
        if self._has_teacher:
            # The schedule sizes the pipeline's tensors by this config; the layers keep the original one.
            self.config = copy.copy(self.config)
            self.config.hidden_size += self._student_width if teacher is None else teacher.config.hidden_size

    def set_input_tensor(self, input_tensor) -> None:
        stacked = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self._teacher_input = None
        if not self._has_teacher or stacked is None:
            super().set_input_tensor(input_tensor)
            return
        student, teacher = stacked.split([self._student_width, stacked.shape[-1] - self._student_width], dim=-1)
        super().set_input_tensor(student)
        if self._teaches_itself:
            self._teacher_input = teacher.detach().contiguous()
        else:
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
            self.decoder.input_tensor = _one_row(self.decoder.input_tensor)
            if self._teacher_input is not None:
                self._teacher_input = _one_row(self._teacher_input)
        taught = None
        if self._has_teacher:
            # An evaluation's forwards are not the next step's.
            measured = self._teacher_cost if self.training else contextlib.nullcontext()
            inputs = input_ids, position_ids, attention_mask
            with torch.no_grad(), measured:
                if self._teaches_itself:
                    taught = self._forward_without_adapters(*inputs, kwargs["padding_mask"], packed_seq_params)
                else:
                    masks = dict(padding_mask=padding_mask, packed_seq_params=packed_seq_params)
                    with heads_without_logits(self.teacher) as heads:
                        taught = self.teacher(*inputs, **masks)
                    (self.taught,) = heads or [None]
        hidden = super().forward(input_ids, position_ids, attention_mask, **kwargs)
        if self.post_process:
            return hidden
        if packed_seq_params is not None and packed_seq_params.rows > 1:
            hidden = hidden.view(-1, packed_seq_params.rows, hidden.shape[-1])
            if taught is None:
                # The schedule frees what it has sent, and takes no view.
                return make_viewless_tensor(hidden, requires_grad=hidden.requires_grad, keep_graph=True)
        return hidden if taught is None else torch.cat([hidden, taught], dim=-1)

    def _forward_without_adapters(self, input_ids, position_ids, attention_mask, padding_mask, packed_seq_params):
        """The teacher's hidden states where it is the model itself: in evaluation mode, from its own input."""
        in_training = [module for module in self.modules() if module.training]
        before = self.decoder.input_tensor
        # Whoever has an objective attached has taken the place of the model's scale of logits in this forward.
        scale_logits = functools.partial(type(self)._scale_logits, self)
        try:
            self.adapters.on = False
            self.decoder.input_tensor = self._teacher_input
            for module in in_training:
                module.training = False
            with replaced(self, "_scale_logits", scale_logits), heads_without_logits(self) as heads:
                taught = super().forward(
                    input_ids,
                    position_ids,
                    attention_mask,
                    padding_mask=padding_mask,
                    packed_seq_params=packed_seq_params,
                )
        finally:
            self.adapters.on = True
            self.decoder.input_tensor, self._teacher_input = before, None
            for module in in_training:
                module.training = True
        (self.taught,) = heads or [None]
        return taught

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.adapters is not None:
            state = {key: tensor for key, tensor in state.items() if ".lora." in key}
        if self.keeps_teacher:
            state |= self.teacher.sharded_state_dict(f"{prefix}{_TEACHER}", sharded_offsets, metadata)
        return state

    def load_state_dict(self, state_dict, strict: bool = True, **keywords):
        """Megatron's loading of a checkpoint, which has the adapters alone where there are some."""
        if self.keeps_teacher:
            of_teacher = {key: value for key, value in state_dict.items() if key.startswith(_TEACHER)}
            state_dict = {key: value for key, value in state_dict.items() if key not in of_teacher}
            own = {key.removeprefix(_TEACHER): value for key, value in of_teacher.items()}
            self.teacher.load_state_dict(own, strict, **keywords)
            self.teacher_is_known = True
        if self.adapters is None:
            return super().load_state_dict(state_dict, strict, **keywords)
        found = super().load_state_dict(state_dict, False, **keywords)
        if missing := [name for name in found.missing_keys if ".lora." in name]:
            raise RuntimeError(f"the checkpoint did not give {missing[0]}")
        return found

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


def _one_row(hidden: torch.Tensor) -> torch.Tensor:
    """[s b, 1, h] of packed rows [s, b, h]."""
    return hidden.flatten(0, 1).unsqueeze(1)


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
