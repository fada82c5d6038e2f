"""An objective inside anybody's Megatron-Core training: GPTModel's output processor.

qtarget = OutputProcessor("dft", vocab_size=32000)
losses = model(tokens, position_ids, mask, labels=labels, loss_mask=loss_mask, output_processor=qtarget)
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from qtarget_megatron import objectives
from qtarget_megatron.data import IGNORE_INDEX
from qtarget_megatron.loss.linear_cross_entropy import AUTO
from qtarget_megatron.megatron.training.step import LossContext, LossSettings, output_processor
from qtarget_megatron.objectives import Objective
from qtarget_megatron.statistics import TokenStatistics


class OutputProcessor:
    """Takes the place of the output layer and cross-entropy of a megatron-core GPTModel, whose output it makes.

    Give it to the model's forward with the labels: the output is the loss of each token, float32 ``[b, s]``, as without
    it, so that a script's own loss function, masks and normalisation stay. Logits exist a chunk of tokens at a time.

    objective: a name with arguments (``"focal", "gamma=2"``) or an Objective; one without a second model, since the
    model has none (a teacher needs `qtarget_megatron.finetune`, or `qtarget_cross_entropy` with its logits).
    vocab_size: of the true vocabulary, without padding. chunk_size: tokens whose logits exist at a time, see
    `qtarget_linear_cross_entropy`; None makes Megatron's own output layer make all of them.
    statistics: of the last micro-batch, `[s, b]` (probability, entropy, masses of each token), for logs.
    Collectives: those of `qtarget_linear_cross_entropy`, over the output layer's tensor-parallel group.

    The model's own scale of its logits (MuP) is kept. Each call raises ValueError for a model with heads that predict
    several tokens, which Megatron trains with its own cross-entropy, and, unless chunk_size is None, for an output
    layer that is not Megatron's plain one (adapters, a bias, FSDP, defer_embedding_wgrad_compute) or another rule for
    logits.
    """

    def __init__(
        self,
        objective: str | Objective,
        *arguments: str,
        vocab_size: int,
        chunk_size: int | Literal["auto"] | None = AUTO,
        backend: str = "auto",
    ):
        if isinstance(objective, str):
            objective = objectives.from_arguments(objective, list(arguments))
        elif arguments:
            raise ValueError(f"an Objective has its arguments already, got {', '.join(arguments)} as well: drop them")
        if objective.needs_teacher:
            raise ValueError(
                f"objective {objective} reads a second model, and an output processor has none: use "
                "qtarget_megatron.finetune, or qtarget_cross_entropy with teacher_logits"
            )
        self._settings = LossSettings(objective, vocab_size, backend, chunk_size)
        self.statistics: TokenStatistics | None = None

    def __call__(self, *, labels: Tensor, loss_mask: Tensor | None = None, context=None, **arguments) -> Tensor:
        """What GPTModel calls.

        labels, loss_mask: ``[b, s]``; tokens whose mask is 0 get a loss of 0.
        context:           the model's output_processor_context, here side inputs by name, each ``[b, s]``.
        """
        if labels is None:
            raise ValueError("an objective needs labels: give them to the model's forward on the last pipeline stage")
        if loss_mask is not None:
            labels = labels.masked_fill(loss_mask == 0, IGNORE_INDEX)
        step = LossContext(self._settings, context or {})
        losses = output_processor(labels=labels, context=step, **arguments)
        self.statistics = step.statistics
        return losses
