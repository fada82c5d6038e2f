"""What travels through GPTModel.forward to an output processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from qtarget_megatron.megatron.model.output_head import OutputHead


class OutputContext(Protocol):
    """What StackedGPTModel asks of an output processor's context.

    teacher: None at first; on a last stage the model puts the output head of its second model here, if it has one.
    """

    teacher: OutputHead | None
