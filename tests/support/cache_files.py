"""Small teacher caches for tests, of made-up entries."""

from types import SimpleNamespace

import numpy as np

from qtarget_megatron.teacher_cache import (
    CacheHeader,
    CacheWriter,
    SampleEntries,
    TeacherCache,
    context_digests,
    template_digest,
    tokenizer_digest,
)

VOCABULARY = {f"token {i}": i for i in range(50)}
TOKENIZER = SimpleNamespace(get_vocab=lambda: VOCABULARY, chat_template=None)
# Samples without supervised tokens at both ends and in a row.
LENGTHS = [0, 3, 1, 0, 0, 5, 2, 0]


def header(num_samples=8, **changes):
    fields = dict(
        data="d" * 64,
        num_samples=num_samples,
        tokenizer=tokenizer_digest(TOKENIZER),
        chat_template=template_digest(TOKENIZER),
        teacher="teacher",
        teacher_files="f",
        precision="float32",
        vocab_size=300,
        seq_length=32,
        k=4,
    )
    return CacheHeader(**(fields | changes))


def text(seed, n):
    """Token ids and supervision of a sample with n supervised tokens."""
    draw = np.random.default_rng(seed)
    supervised = np.zeros(2 * n + 3, dtype=bool)
    supervised[draw.choice(np.arange(1, 2 * n + 3), n, replace=False)] = True
    return draw.integers(0, 50, len(supervised)), supervised


def entries(head, seed, n):
    """A sample's entries; None without tokens. The last id of the vocabulary is always among them."""
    if n == 0:
        return None
    draw = np.random.default_rng(seed)
    ids = np.stack([draw.choice(min(head.vocab_size, 10**5), head.k, replace=False) for _ in range(n)])
    ids = head.vocab_size - 1 - ids
    p = np.sort(draw.dirichlet(np.ones(head.k + 1) / 3, n)[:, : head.k] + 1e-12)[:, ::-1]
    counts = np.full(n, head.k) if head.top_p is None else draw.integers(1, head.k + 1, n)
    tail = np.clip(1 - np.where(np.arange(head.k) < counts[:, None], p, 0).sum(-1), 0, 1)
    return SampleEntries(ids, np.log(p).astype(np.float32), counts, tail, context_digests(*text(seed, n)))


def write(directory, head, lengths=LENGTHS, upto=None):
    """Write a cache, or its first samples, going on behind what is there."""
    cache = CacheWriter(directory, head, TOKENIZER)
    if cache.check():
        return
    done = cache.open()
    samples = [entries(head, seed, n) for seed, n in enumerate(lengths)]
    cache.append(samples[done:upto])
    if upto is None:
        cache.finish()


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def read_all(directory):
    cache = TeacherCache(directory)
    return [cache.sample(index) for index in range(len(cache))]
