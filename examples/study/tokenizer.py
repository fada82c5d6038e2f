"""The tokenizer of the study's own models: a token for each character."""

from __future__ import annotations

from examples.study.tasks import ALPHABET, END

VOCABULARY_SIZE = len(ALPHABET) + 1


def character_tokenizer():
    """A PreTrainedTokenizerFast; the token behind the characters ends an answer, and pads."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({character: i for i, character in enumerate(ALPHABET)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(END)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
