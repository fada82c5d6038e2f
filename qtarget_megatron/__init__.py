"""Supervised fine-tuning on Megatron-Core with designed target distributions.

The loss and everything else that needs no Megatron is imported from here; qtarget_megatron.megatron plugs it into
Megatron's training loop, and ``qtarget finetune`` runs it.
"""

import logging
from pathlib import Path

from qtarget_megatron import _source_tree

_folder = Path(__file__).parent
if (_copy := _source_tree.installed_copy(_folder)) is not None:
    _source_tree.give_way(_folder, _copy)
else:
    # Where its log goes is its user's choice.
    logging.getLogger(__name__).addHandler(logging.NullHandler())

    from qtarget_megatron import objectives
    from qtarget_megatron._version import __version__
    from qtarget_megatron.inspection import induced_target, target_distribution
    from qtarget_megatron.loss.cross_entropy import qtarget_cross_entropy
    from qtarget_megatron.loss.linear_cross_entropy import qtarget_linear_cross_entropy
    from qtarget_megatron.loss.samples import Samples
    from qtarget_megatron.loss.sparse_teacher import SparseTeacher
    from qtarget_megatron.objectives import Objective
    from qtarget_megatron.statistics import TokenStatistics

__all__ = [
    "Objective",
    "Samples",
    "SparseTeacher",
    "TokenStatistics",
    "__version__",
    "induced_target",
    "objectives",
    "qtarget_cross_entropy",
    "qtarget_linear_cross_entropy",
    "target_distribution",
]
