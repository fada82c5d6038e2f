"""What a second model costs in a training step."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.nn import Module


class TeacherCost:
    """Time and memory of the teacher on this rank, its output layer aside, which is part of the loss.

    Time is taken between events of the device, which are read once they have happened: nothing waits for them. So a
    step may report a forward of the one before.
    """

    def __init__(self):
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._milliseconds = 0.0
        self._models: list[tuple[Module, Module]] = []

    def add_model(self, teacher: Module, student: Module) -> None:
        """A model chunk's teacher. Weights that it shares with the student are no cost of it."""
        self._models.append((teacher, student))

    def __enter__(self) -> None:
        # Only ranks of a last stage ever take the time: the events of the others must not pile up.
        self._read_completed()
        start = torch.cuda.Event(enable_timing=True)
        start.record()
        self._running.append((start, torch.cuda.Event(enable_timing=True)))

    def __exit__(self, *exception) -> None:
        self._running[-1][1].record()

    def take_milliseconds(self) -> float:
        """Milliseconds of the forwards that were completed since the last call."""
        self._read_completed()
        total, self._milliseconds = self._milliseconds, 0.0
        return total

    def _read_completed(self) -> None:
        while self._running and self._running[0][1].query():
            start, end = self._running.popleft()
            self._milliseconds += start.elapsed_time(end)

    def bytes_with(self, *held: Tensor) -> int:
        """Bytes of the teacher's weights on this rank plus the given tensors."""
        own = []
        for teacher, student in self._models:
            shared = {parameter.data_ptr() for parameter in student.parameters()}
            own += [parameter for parameter in teacher.parameters() if parameter.data_ptr() not in shared]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*own, *held))
