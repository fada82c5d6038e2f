"""Small fast tokenizers and chat templates in the style of the common ones, made on the spot."""

import string

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|bos|>{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
MISTRAL = (
    "<|bos|>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
# One blank between the answer and </s>, and the answer is stripped.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} </s>"
    "{% else %}<|bos|>[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
# The system text moves to the last user turn, as in Mistral's later templates.
SYSTEM_LAST = (
    "{% set ns = namespace(system='') %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content ~ '\n' %}"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[INST] {{ ns.system if messages[loop.index0 + 2:] == [] else '' }}"
    "{{ m.content }} [/INST]{% endif %}{% endfor %}"
)
# Thinking is dropped before the last question and written, empty if need be, in the last answer.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set answer = m.content %}"
    "{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ answer }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.name is defined %}{{ m.name }}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ["<|bos|>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>"]
LINES = [
    "What is the capital of France?",
    "The capital is Paris.",
    "user assistant system",
    "1 + 1 = 2",
]


def byte_tokenizer(template=None, *, bos=None, eos="</s>", trim=False, special=SPECIAL, size=330, append_eos=False):
    """A byte-level BPE; most emoji are split between several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_special_tokens([token if isinstance(token, AddedToken) else AddedToken(token) for token in special])
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos or append_eos:
        single = [bos] * bool(bos) + ["$A"] + [eos] * append_eos
        used = [(token, backend.token_to_id(token)) for token in single if token != "$A"]
        steps.append(processors.TemplateProcessing(single=single, special_tokens=used))
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=template)


def metaspace_tokenizer(template):
    """A BPE in the style of Llama 2: blanks are letters, other unknown characters fall to bytes."""
    octets = [f"<0x{value:02X}>" for value in range(256)]
    letters = ["▁", *string.ascii_letters, *"[]/?.", "▁T", "▁Th"]
    pieces = ["<unk>", "<|bos|>", "</s>", *octets, *letters]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "T"), ("▁T", "h")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(["<unk>", "<|bos|>", "</s>"])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="</s>", chat_template=template
    )


def chat(*turns):
    """chat("u:Hi", "a:Hello") -> a record."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}
