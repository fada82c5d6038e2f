"""What the study measures of a model on real problems, against counts by hand and a loop over transformers' logits."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from small_tokenizers import CHATML, SPECIAL, byte_tokenizer

from examples.study.evaluate_real import Solutions, evaluate
from examples.study.results import unpack

DIGITS = "0123456789"


def record(question, solution):
    return {
        "id": question,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": solution}],
    }


class Bigrams(torch.nn.Module):
    """The next token by the last one alone."""

    def __init__(self, vocabulary, digits):
        super().__init__()
        self.table = 2 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(38))
        # Digits often, so that numbers are written.
        self.table[:, digits] += 2

    def forward(self, ids):
        return SimpleNamespace(logits=self.table[ids])


@pytest.fixture(scope="module")
def letters():
    """A token for each character."""
    return byte_tokenizer(CHATML, eos="<|im_end|>", size=256)


def test_results_are_numbers_of_a_bigram_model_by_hand(letters):
    token = {digit: letters.convert_tokens_to_ids(digit) for digit in DIGITS}
    blank = letters(" ")["input_ids"][0]
    model = Bigrams(len(letters), list(token.values()))
    p = {T: (model.table.double() / T).softmax(-1) for T in (1.0, 0.5)}

    def probability(number, temperature):
        table, last, found = p[temperature], blank, 1.0
        for digit in number:
            found *= table[last, token[digit]].item()
            last = token[digit]
        return found * (1 - sum(table[last, other].item() for other in token.values()))

    def is_likeliest(number):
        last = blank
        for digit in number:
            if model.table[last].argmax().item() != token[digit]:
                return False
            last = token[digit]
        return model.table[last].argmax().item() not in token.values()

    numbers = [str(number) for number in range(1000)]
    solved = [record(number, f"It is 3 + 4 = {number} in all.\n#### {number}") for number in numbers]
    found = Solutions(model, letters, (1.0, 0.5)).of(solved)
    assert found["result sampled"] == pytest.approx([probability(number, 1.0) for number in numbers], rel=1e-4)
    assert found["result sampled 0.5"] == pytest.approx([probability(number, 0.5) for number in numbers], rel=1e-4)
    right = [float(is_likeliest(number)) for number in numbers]
    # One number of two digits is the likeliest; its first digit alone, and longer ones that begin like it, are not.
    assert found["result greedy"] == right and sum(right) == 1 and 10 <= right.index(1) < 100


def test_a_problem_s_results_count_as_one(letters):
    model = Bigrams(len(letters), [letters.convert_tokens_to_ids(digit) for digit in DIGITS])
    both = "a = 7, b = 18"
    apart = Solutions(model, letters).of([record("a", "a = 7,"), record("b", "b = 18")])
    found = Solutions(model, letters).of([record("q", both), record("none", "It is obvious: 4.")])
    assert found["result sampled"] == pytest.approx([sum(apart["result sampled"]) / 2], rel=1e-5)
    assert len(found["nll"]) == 2 and len(found["result greedy"]) == 1


@pytest.mark.parametrize("size", [256, 330])
def test_tokens_of_results(size):
    """Merged with the blank before it or not, a number's tokens are all of it and nothing behind it."""
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>", size=size, special=SPECIAL)
    solution = "Half of 24 is 24 / 2 = 12.50 apples\nIn all 1 + 1 = 2, so $x = \\boxed{1,234}$."
    # The question holds the solution as well: the answer's tokens are meant.
    ids, supervised, spans = Solutions(None, tokenizer)._encoded(record(solution, solution))
    assert [tokenizer.decode(ids[begin:end]).strip() for begin, end in spans] == ["12.50", "2", "1,234"]
    assert all(supervised[begin:end].all() for begin, end in spans)


@pytest.fixture(scope="module")
def models(tmp_path_factory, letters):
    folder, tokenizer = tmp_path_factory.mktemp("models"), letters
    for seed, name in enumerate(("base", "trained")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=256, initializer_range=0.3,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "base", folder / "trained"


def test_measurements_against_a_loop_over_transformers_logits(models):
    base, trained = models
    solved = [record(f"What is {n} + {n}?", f"{n} + {n} = {2 * n}\n#### {2 * n}") for n in range(3, 15)]
    found = evaluate(
        trained, base, dev=solved[:4], test=solved[4:], answered=3, temperatures=(1.0, 0.5), max_new_tokens=5,
        dtype=torch.float32,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(path).double().eval() for path in (trained, base))
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in DIGITS]
    nll, kl, results = [], [], []
    with torch.no_grad():
        for asked in solved[4:]:
            head = tokenizer.apply_chat_template(asked["messages"][:1], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(asked["messages"], tokenize=False)
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
            begin = len(tokenizer(head, add_special_tokens=False)["input_ids"])
            end = next(place for place in range(begin, len(ids)) if ids[place] == tokenizer.eos_token_id) + 1
            log_p, log_q = (model(torch.tensor([ids])).logits[0].log_softmax(-1) for model in (one, other))
            places = range(begin - 1, end - 1)
            nll.append(-sum(log_p[place, ids[place + 1]].item() for place in places) / len(places))
            kl.append(sum((log_q[place].exp() * (log_q[place] - log_p[place])).sum().item() for place in places))
            kl[-1] /= len(places)
            number = asked["messages"][1]["content"].split("= ")[1].split("\n")[0]
            before = whole[: whole.rindex(f"{number}\n####")]
            # One token after the other, each behind what stands before it alone.
            written, probability = tokenizer(before, add_special_tokens=False)["input_ids"], 1.0
            for token in tokenizer(number)["input_ids"]:
                probability *= one(torch.tensor([written])).logits[0, -1].softmax(-1)[token].item()
                written.append(token)
            p = one(torch.tensor([written])).logits[0, -1].softmax(-1)
            results.append(probability * (1 - p[digits].sum().item()))
            assert written == ids[: len(written)]
    assert found.metrics["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert unpack(found.outcomes["nll"]) == pytest.approx(nll, abs=1e-4)
    assert found.metrics["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.metrics["result sampled"] == pytest.approx(sum(results) / len(results), rel=1e-4)
    assert found.metrics["dev"] == (found.metrics["dev result greedy"] + found.metrics["dev result sampled"]) / 2
    for name in ("greedy", "sampled", "sampled 0.5"):
        assert len(unpack(found.outcomes[name])) == 3 and found.metrics[name] == unpack(found.outcomes[name]).mean()
        assert len(unpack(found.outcomes[f"result {name}"])) == 8
    assert json.loads(json.dumps(found.metrics)) == found.metrics and all(map(math.isfinite, found.metrics.values()))


def test_answers_need_not_be_asked(models):
    base, trained = models
    solved = [record("1?", "1 = 1"), record("2?", "2 = 2")]
    found = evaluate(
        trained, base, dev=solved, test=solved, answered=0, temperatures=(1.0,), max_new_tokens=5, dtype=torch.bfloat16
    )
    assert "greedy" not in found.metrics and found.metrics["kl"] > 0
