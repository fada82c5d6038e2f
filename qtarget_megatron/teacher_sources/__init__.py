"""Teachers that are not in this job: what other programs say or have written, as entries of a teacher cache.

Each source gives, of a sample that our data code has encoded, the most likely tokens at its supervised tokens:

    endpoint         a server of vLLM or SGLang, asked for the log-probabilities of a prompt
    distillkit       the packed or unpacked rows of a DistillKit data set
    megatron_logits  what Megatron-LM's --logits-save-dir has written
    ensemble         several caches of the same data, weighted

No source runs anything that a file holds. What is common to them is in ``source``.
"""

from qtarget_megatron.teacher_sources.distillkit import DistillKitRows
from qtarget_megatron.teacher_sources.endpoint import Endpoint
from qtarget_megatron.teacher_sources.ensemble import Ensemble
from qtarget_megatron.teacher_sources.megatron_logits import MegatronLogits
from qtarget_megatron.teacher_sources.source import TeacherSource, distance, label_shares

__all__ = [
    "DistillKitRows",
    "Endpoint",
    "Ensemble",
    "MegatronLogits",
    "TeacherSource",
    "distance",
    "label_shares",
]
