"""Instruction data: which tokens are trained on, nothing of how ranks share them.

Records come from JSON lines or other files (qtarget_megatron.data.records). One holds ``{"messages": [{"role": ...,
"content": ...}, ...]}``, rendered by the tokenizer's chat template, with the assistant messages as targets; or
``{"prompt": ..., "completion": ...}`` with the completion as target. Fields that an objective asks for are its side
inputs (qtarget_megatron.data.side_inputs), other fields are ignored. Everything here depends on the record, the
tokenizer and the seed only, so every parallel layout sees the same samples.
"""

from qtarget_megatron.data.batch import Batch
from qtarget_megatron.data.dataset import (
    SampleNotes,
    SampleStatus,
    SupervisedDataset,
    inspect_samples,
    training_item,
)
from qtarget_megatron.data.jsonl import JsonlFile
from qtarget_megatron.data.messages import ROLES
from qtarget_megatron.data.packed import PackedDataset
from qtarget_megatron.data.records import ConcatenatedRecords, Records, open_records
from qtarget_megatron.data.rows import alignment
from qtarget_megatron.data.supervision import EncodedSample, encode, encode_at
from qtarget_megatron.data.template import writes_date
from qtarget_megatron.data.tokenizer import compare_tokenizers, load_tokenizer
from qtarget_megatron.statistics import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "ROLES",
    "Batch",
    "ConcatenatedRecords",
    "EncodedSample",
    "JsonlFile",
    "PackedDataset",
    "Records",
    "SampleNotes",
    "SampleStatus",
    "SupervisedDataset",
    "alignment",
    "compare_tokenizers",
    "encode",
    "encode_at",
    "inspect_samples",
    "load_tokenizer",
    "open_records",
    "training_item",
    "writes_date",
]
