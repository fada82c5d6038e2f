"""A teacher's most likely tokens on disk: for each supervised token of each sample their ids, log-probabilities and the
mass of all others, read by sample index in any order.

A cache is a directory of files that other programs open (safetensors, JSON):

    cache.json             what the cache was made from (CacheHeader), "complete", and the list of its parts
    vocabulary.json        [id, token] of the tokenizer, by id; its SHA-256 is the header's "tokenizer"
    samples-N.safetensors  a part: the samples from index N on, up to 512 of them or 32 MiB

A part holds, with n samples, T tokens and k kept entries for each token, most likely first:

    ids            uint16 [T, k]    token ids modulo 65536 (with top-p: of the kept entries only, [E]; so below)
    ids_high       uint8 [T, k]     ids // 65536, only for vocabularies above 65536
    log_p          float16 [T, k]   log p - top_log_p; or float32: log p itself
    top_log_p      float32 [T]      the largest log p, only with float16
    tail           float32 [T]      mass of the tokens that are not kept
    context        uint32 [T]       CRC-32 of what the teacher read up to this token (context_digests)
    counts         uint16 [T]       kept entries, only with top-p
    token_offsets  int64 [n + 1]    where a sample's tokens begin
    entry_offsets  int64 [n + 1]    where its entries begin, only with top-p
    crc32          uint32 [n]       of a sample's bytes in the tensors of tokens and entries, by name

Bytes per token, to which each sample adds 12 (20 with top-p):

    vocabulary         dtype      formula     k = 8    32   128
    up to 65536        float16    4 k + 12       44   140   524
                       float32    6 k + 8        56   200   776
    up to 16777216     float16    5 k + 12       52   172   652
                       float32    7 k + 8        64   232   904

top-p keeps of each token the smallest set whose mass reaches p, at most k, and adds 2 bytes for the count.

float16 rounds log p - top_log_p by at most 2^-11 of itself: the top entry is as exact as float32, and a token at a
thousandth of its probability is off by 0.4% at most. Measured on 900 tokens of English and code under
SmolLM2-135M-Instruct (mean entropy 3.9 nats), k = 32: the kept probabilities of a token were off by 1.4e-4 in sum;
float16 of log p itself, without top_log_p, would have made that 3.0e-4.
"""

from qtarget_megatron.teacher_cache.header import CacheHeader, context_digests, template_digest, tokenizer_digest
from qtarget_megatron.teacher_cache.parts import SampleEntries
from qtarget_megatron.teacher_cache.reader import TeacherCache
from qtarget_megatron.teacher_cache.writer import CacheWriter

__all__ = [
    "CacheHeader",
    "CacheWriter",
    "SampleEntries",
    "TeacherCache",
    "context_digests",
    "template_digest",
    "tokenizer_digest",
]
