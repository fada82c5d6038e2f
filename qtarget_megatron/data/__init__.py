"""Instruction data: which tokens are trained on, nothing of how ranks share them.

Records come from JSON lines or other files (qtarget_megatron.data.records) and are of one of five forms
(qtarget_megatron.data.forms): a conversation, rendered by the tokenizer's chat template, with the assistant messages as
targets; a prompt with its completion as target; or token ids with their labels. Fields that an objective asks for are
its side inputs (qtarget_megatron.data.side_inputs), other fields are ignored. Everything here depends on the record,
the tokenizer and the seed only, so every parallel layout sees the same samples.
"""

from qtarget_megatron.data.batch import Batch
from qtarget_megatron.data.dataset import (
    SampleNotes,
    SampleSizes,
    SupervisedSamples,
    measure_samples,
    training_item,
)
from qtarget_megatron.data.forms import AUTO, FORMS, canonical, form_of
from qtarget_megatron.data.jsonl import JsonlFile
from qtarget_megatron.data.messages import ROLES
from qtarget_megatron.data.order import SampleOrder
from qtarget_megatron.data.prompts import open_prompts, prompt_at, prompt_ids
from qtarget_megatron.data.records import ConcatenatedRecords, Records, open_records
from qtarget_megatron.data.row_dataset import KeptSamples, Packing, RowDataset, aligned_lengths
from qtarget_megatron.data.rows import EvaluationRows, RowPlan, alignment, balance
from qtarget_megatron.data.sources import HeldOutSet, Source, held_out_sets, training_sources
from qtarget_megatron.data.supervision import EncodedSample, encode, encode_at
from qtarget_megatron.data.template import writes_date
from qtarget_megatron.data.tokenizer import compare_tokenizers, load_tokenizer
from qtarget_megatron.statistics import IGNORE_INDEX

__all__ = [
    "AUTO",
    "FORMS",
    "IGNORE_INDEX",
    "ROLES",
    "Batch",
    "ConcatenatedRecords",
    "EncodedSample",
    "EvaluationRows",
    "HeldOutSet",
    "JsonlFile",
    "KeptSamples",
    "Packing",
    "Records",
    "RowDataset",
    "RowPlan",
    "SampleNotes",
    "SampleOrder",
    "SampleSizes",
    "Source",
    "SupervisedSamples",
    "aligned_lengths",
    "alignment",
    "balance",
    "canonical",
    "compare_tokenizers",
    "encode",
    "encode_at",
    "form_of",
    "held_out_sets",
    "load_tokenizer",
    "measure_samples",
    "open_prompts",
    "open_records",
    "prompt_at",
    "prompt_ids",
    "training_item",
    "training_sources",
    "writes_date",
]
