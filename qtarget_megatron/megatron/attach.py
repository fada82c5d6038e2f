"""An objective inside anybody's Megatron-Core training: it takes the place of a language model's cross-entropy.

    qtarget = attach(model, "dft", vocab_size=32000)
    losses = model(tokens, position_ids, mask, labels=labels, loss_mask=loss_mask)

While a forward with labels runs, the output layer hands its input on, in the place of logits, and the loss multiplies
it by the layer's weight, a chunk of tokens at a time. Nothing else of the model is known here, so one way serves every
language model of Megatron-Core, and its heads that predict tokens further on (multi-token prediction).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from qtarget_megatron import collectives, objectives
from qtarget_megatron.data import IGNORE_INDEX
from qtarget_megatron.loss.linear_cross_entropy import AUTO
from qtarget_megatron.loss.samples import Samples
from qtarget_megatron.loss.sparse_teacher import SparseTeacher
from qtarget_megatron.megatron.head_loss import HeadLoss, LossInputs
from qtarget_megatron.megatron.label_roll import LabelRoll
from qtarget_megatron.megatron.model.output_head import (
    OutputHead,
    check_layer,
    check_scale,
    handing_on,
    logit_scale,
    replaced,
)
from qtarget_megatron.objectives import Objective
from qtarget_megatron.statistics import TokenStatistics

# The attribute of a model by which what is attached to it is found.
ATTRIBUTE = "attached_objective"


def attach(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    objective: str | Objective,
    *arguments: str,
    vocab_size: int,
    chunk_size: int | Literal["auto"] | None = AUTO,
    backend: str = "auto",
    teacher_vocab_size: int | None = None,
    second_model: bool = False,
) -> AttachedObjective:
    """Put an objective in the place of a model's cross-entropy, from its next forward with labels on.

    The model's output stays the loss of each token, float32 ``[b, s]``, so that a script's own loss function, masks and
    normalisation stay. A forward without labels gives Megatron's own logits. Attaching to a model once more replaces
    what was attached; see `AttachedObjective.detach`.

    Args:
        model: a megatron-core language model (GPTModel, HybridModel, ...), also inside of Float16Module and
            DistributedDataParallel, or the list of a rank's model chunks. Pipeline stages before the last one stay as
            they are.
        objective: a name with arguments (``"focal", "gamma=2"``) or an Objective.
        vocab_size: of the true vocabulary, without padding.
        chunk_size: tokens whose logits exist at a time, see `qtarget_linear_cross_entropy`; None makes Megatron's own
            output layer make all of them.
        backend: of the kernels.
        teacher_vocab_size: of a live second model, where it is the smaller one.
        second_model: every micro-batch brings one, see `AttachedObjective.inputs`. Without it an objective that reads a
            second model is refused.

    Returns:
        What is attached: statistics of the last micro-batch, and side inputs of the next.

    Heads that predict tokens further on (multi-token prediction) are trained with the same objective: what belongs to a
    label goes with it, and Megatron scales their losses as it does its own.

    The model's own scale of its logits (MuP) is kept. Raises ValueError for what is no such model, and, unless
    chunk_size is None, for an output layer that is not Megatron's plain one (adapters, a bias, FSDP,
    defer_embedding_wgrad_compute) or another rule for logits.

    Collectives: those of `qtarget_linear_cross_entropy`, over the output layer's tensor-parallel group.
    """
    if isinstance(objective, str):
        objective = objectives.from_arguments(objective, list(arguments))
    elif arguments:
        raise ValueError(f"an Objective has its arguments already, got {', '.join(arguments)} as well: drop them")
    if objective.needs_teacher and not second_model:
        raise ValueError(
            f"objective {objective} reads a second model, and none is attached: use qtarget_megatron.finetune, "
            f"qtarget_cross_entropy with teacher_logits{', or refresh=0' if objective.refresh else ''}"
        )
    loss = HeadLoss(objective, vocab_size, backend, chunk_size, teacher_vocab_size)
    chunks = model if isinstance(model, Sequence | torch.nn.ModuleList) else [model]
    last = [bare for bare in map(_language_module, chunks) if bare.post_process]
    if len(last) > 1:
        raise ValueError(f"expected the chunks of one model, of which one makes logits, got {len(last)} that do")
    return AttachedObjective(loss, last[0] if last else None)


def _language_module(model: Any) -> LanguageModule:
    """The bare model. ValueError where there is none."""
    bare = model
    while not isinstance(bare, LanguageModule):
        bare = getattr(bare, "module", None)
        if bare is None:
            raise ValueError(
                "expected a megatron-core language model (GPTModel, HybridModel, ...), wrapped or not, got "
                f"{type(model).__name__}"
            )
    taken = inspect.signature(bare.forward).parameters
    by_name = "labels" in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    if not by_name or (bare.post_process and not hasattr(bare, "output_layer")):
        raise ValueError(
            f"expected a language model with an output_layer whose forward takes labels, got {type(bare).__name__}"
        )
    return bare


def _is_tied(model: LanguageModule) -> bool:
    return getattr(model, "share_embeddings_and_output_weights", False)


@dataclass(frozen=True)
class HeadResult:
    """What the objective has made of one head in a micro-batch.

    labels:       [b, s], ignored where the mask is 0.
    token_inputs: side inputs, each at its label.
    losses:       of each token, [b, s], detached.
    statistics:   of each token, [s, b].
    """

    labels: Tensor
    token_inputs: Mapping[str, Tensor]
    losses: Tensor
    statistics: TokenStatistics


class AttachedObjective:
    """An objective in the place of a model's cross-entropy; attach() makes it.

    heads: of the last micro-batch: that of the next token, then those of multi-token prediction in order. Empty before
           the last pipeline stage.
    """

    def __init__(self, loss: HeadLoss, model: LanguageModule | None):
        """model: None before the last pipeline stage, where nothing is changed."""
        self.loss = loss
        self.heads: tuple[HeadResult, ...] = ()
        self._model, self._inputs = model, LossInputs()
        self._forward: _Forward | None = None
        self._open = contextlib.ExitStack()
        self._handles: list[Any] = []
        if model is not None:
            self._attach(model)

    @property
    def statistics(self) -> TokenStatistics | None:
        """Probability, entropy, masses of each token of the last micro-batch, `[s, b]`, for logs; None where there are
        none."""
        return self.heads[0].statistics if self.heads else None

    @contextlib.contextmanager
    def inputs(
        self,
        token_inputs: Mapping[str, Tensor] | None = None,
        *,
        sparse_teacher: SparseTeacher | None = None,
        teacher: Callable[[], OutputHead | None] = lambda: None,
        samples: Samples | None = None,
        num_supervised: tuple[int, ...] | None = None,
    ) -> Iterator[None]:
        """Give the model's forward what else the objective reads.

        token_inputs:   side inputs by name, each ``[b, s]`` like the labels.
        sparse_teacher: a cached second model, of ``[b, s]`` tokens.
        teacher:        called for the output head of a live second model.
        samples:        the sample of each token, ``[b, s]``.
        num_supervised: numbers of labels that are not ignored, where the host knows them, see LossInputs.
        """
        self._inputs = LossInputs(token_inputs or {}, sparse_teacher, teacher, num_supervised, samples)
        try:
            yield
        finally:
            self._inputs = LossInputs()

    def set_objective(self, objective: Objective) -> None:
        """Another objective from the next forward on."""
        if objective is not self.loss.objective:
            self.loss = replace(self.loss, objective=objective)

    def detach(self) -> None:
        """Give the model its own cross-entropy back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._model is not None:
            del self._model.compute_language_model_loss
            delattr(self._model, ATTRIBUTE)
        self._model = None

    def _attach(self, model: LanguageModule) -> None:
        self._check(model)
        if (before := vars(model).get(ATTRIBUTE)) is not None:
            before.detach()
        if _is_tied(model) and hasattr(model, "embedding"):
            # The loss adds the weight's gradient to main_grad, and the embedding's comes beside it. Megatron's mark of
            # such a weight is missing where multi-token prediction brings the embedding to a last stage.
            model.shared_embedding_or_output_weight().zero_out_wgrad = True
        self._positions = {name: place for place, name in enumerate(inspect.signature(model.forward).parameters)}
        self._own_loss = model.compute_language_model_loss
        model.compute_language_model_loss = self._compute_loss
        setattr(model, ATTRIBUTE, self)
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def _check(self, model: LanguageModule) -> float | None:
        """The scale of the model's logits. ValueError for a head that cannot be served."""
        scale = logit_scale(model._scale_logits)
        if self.loss.chunk_size is None:
            return scale
        check_layer(model.output_layer, model.shared_embedding_or_output_weight() if _is_tied(model) else None)
        return check_scale(scale)

    # ---- while the model's forward runs

    def _begin(self, model: LanguageModule, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def given(name: str) -> Any:
            place = self._positions.get(name, len(args))
            return args[place] if place < len(args) else kwargs.get(name)

        self.heads, labels = (), given("labels")
        if labels is None:
            self._forward = _Forward(None)
            return args, kwargs
        scale, layer = self._check(model), model.output_layer
        roll = LabelRoll(given("packed_seq_params"), model.cp_group, layer)
        self._forward = _Forward(labels, given("loss_mask"), self._inputs, roll, scale)
        if self.loss.chunk_size is not None:
            self._open.enter_context(handing_on(layer, DeferredLogits))
            # The one thing that Megatron does with logits before the loss.
            self._open.enter_context(replaced(model, "_scale_logits", lambda logits: logits.scaled(scale)))
        elif getattr(layer, "gather_output", False):
            # The loss takes shards.
            kwargs = kwargs | {"runtime_gather_output": False}
        return args, kwargs

    def _end(self, model: LanguageModule, args: tuple, output: Any) -> None:
        if self._forward is not None:
            self.heads = self._forward.in_order()
        self._forward = None
        self._open.close()

    def _compute_loss(self, labels: Tensor, logits: Tensor | DeferredLogits) -> Tensor:
        """In the place of LanguageModule.compute_language_model_loss."""
        forward, loss = self._forward, self.loss
        if forward is None:
            return self._loss_outside(labels, logits)
        if forward.labels is None:
            # Heads of multi-token prediction, of a forward that is to give logits.
            return self._own_loss(labels, logits)
        labels, inputs = forward.next_head(labels)
        if isinstance(logits, DeferredLogits):
            losses, statistics = loss.of_hidden(logits.head, labels, inputs, logits.scale)
            logits.set_computed(labels, statistics)
        else:
            # Another rule than a factor may need its result once more in backward.
            inplace = forward.scale is not None
            losses, statistics = loss.of_logits(logits, labels, inputs, self._model.tp_group, inplace=inplace)
        forward.results.append(HeadResult(labels, inputs.token_inputs, losses.detach(), statistics))
        return losses

    def _loss_outside(self, labels: Tensor, logits: Any) -> Tensor:
        """Where Megatron has taken the model's forward apart."""
        if self.loss.chunk_size is not None:
            raise ValueError(
                "logits in chunks: the model's loss is computed outside of its forward, as "
                "overlap_moe_expert_parallel_comm does: give chunk_size=None"
            )
        return self.loss.of_logits(logits, labels, LossInputs(), self._model.tp_group, inplace=False)[0]


@dataclass
class _Forward:
    """One forward; its heads come one after another, that of the next token last.

    labels: None in a forward without them.
    inputs: those of the next token.
    roll:   from one head to the next.
    scale:  of the logits, None where it is another rule.
    """

    labels: Tensor | None
    loss_mask: Tensor | None = None
    inputs: LossInputs = field(default_factory=LossInputs)
    roll: LabelRoll | None = None
    scale: float | None = None
    results: list[HeadResult] = field(default_factory=list)

    def __post_init__(self):
        self._rolled = self.inputs
        self._mask: Tensor | None = None

    def next_head(self, labels: Tensor) -> tuple[Tensor, LossInputs]:
        """Labels and inputs of the head whose labels Megatron gives, rolled as it has rolled them."""
        if labels is self.labels:
            mask, inputs = self.loss_mask, self.inputs
        else:
            before = self._mask if self._mask is not None else self.loss_mask
            self._mask = self.roll.mask(torch.ones_like(labels) if before is None else before)
            self._rolled = self.roll.inputs(self._rolled)
            mask, inputs = self._mask, self._rolled
        return labels if mask is None else labels.masked_fill(mask == 0, IGNORE_INDEX), inputs

    def in_order(self) -> tuple[HeadResult, ...]:
        """That of the next token first."""
        return (*self.results[-1:], *self.results[:-1])


class DeferredLogits:
    """What an output layer gives in the place of logits [s, b, V_local]: what they are made from.

    Megatron hands it from the output layer to the loss. Between the two it scales logits, and behind them it asks which
    token is the most likely one, to count how often a head of multi-token prediction is right: the loss has seen all
    logits, and knows where it is the label. Nothing else can be asked of it.
    """

    def __init__(self, head: OutputHead, scale: float = 1.0):
        self.head, self.scale = head, scale
        self._computed: tuple[Tensor, TokenStatistics] | None = None

    def scaled(self, factor: float) -> DeferredLogits:
        return DeferredLogits(self.head, self.scale * factor)

    def set_computed(self, labels: Tensor, statistics: TokenStatistics) -> None:
        """What the loss was computed from and what it found: labels [b, s], statistics [s, b]."""
        self._computed = labels, statistics

    def size(self, dim: int) -> int:
        """Columns of the shard. dim: -1."""
        return self.head.layer.output_size_per_partition

    def max(self, dim: int) -> tuple[Tensor, Tensor]:
        """Values and local ids of this rank's largest logits [s, b], as far as their comparison over the ranks goes:
        the first rank's are the largest, and its ids are those of the whole vocabulary. dim: -1."""
        ids = self.argmax(dim)
        value = 1.0 if collectives.rank(self.head.layer.tp_group) == 0 else 0.0
        return torch.full_like(ids, value, dtype=torch.float32), ids

    def argmax(self, dim: int) -> Tensor:
        """The most likely token where it is the label, else -1; [s, b]. dim: -1."""
        assert self._computed is not None, "the loss has not been computed"
        labels, statistics = self._computed
        # log p(y) is that of the largest logit, whose distance from log sum exp is log(sum_exp). The slack is the
        # rounding of float64: it is far below the distance of two float32 logits.
        is_label = statistics.log_p + statistics.sum_exp.log() > -1e-9
        return torch.where(is_label, labels.t(), -1)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is torch.argmax:
            return args[0].argmax(**(kwargs or {}))
        raise ValueError(_asked(getattr(function, "__name__", str(function))))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(_asked(name))


def _asked(name: str) -> str:
    return f"logits in chunks: this model asks for {name} of its logits, which are not made: give chunk_size=None"
