"""qtarget generate: its answers are those of a loop over transformers' logits, whatever the batch."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch
import transformers
from finetune_runs import write_data, write_models
from launching import run_ranks
from lora_runs import write_adapters
from small_tokenizers import CHATML, byte_tokenizer, chat

from qtarget_megatron.commands import convert_hf, generate
from qtarget_megatron.data import encode, load_tokenizer, prompt_ids
from qtarget_megatron.huggingface import Generator, Lora, Sampling
from qtarget_megatron.resumable import ResumableLines

pytestmark = pytest.mark.slow
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    write_models(folder)
    write_data(folder / "data.jsonl", 7, seed=3)
    return folder


def answer(folder, *words, model="untied", data="data.jsonl", code=0, out="out.jsonl"):
    """Records that the command writes; the message where it is to fail."""
    given = ["--hf-model", folder / model, "--data", folder / data, "--out", folder / out, "--max-new-tokens", NEW]
    assert generate.main([str(word) for word in [*given, "--overwrite", *words]]) == code
    if code == 0:
        return [json.loads(line) for line in (folder / out).read_text("utf-8").splitlines()]


def by_hand(folder, prompt, steps=NEW):
    """The likeliest tokens one by one, without a cache, padding or generate(); up to an end of turn."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    end = load_tokenizer(folder).eos_token_id
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    new = ids[len(prompt) :]
    return load_tokenizer(folder).decode(new, skip_special_tokens=True), new[-1] == end


@pytest.mark.parametrize("model", ["untied", "tied", "latent"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_answers_are_the_likeliest_tokens_one_by_one(folder, model, batch):
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    found = answer(folder, "--batch-size", batch, model=model)
    tokenizer = load_tokenizer(folder / model)
    for record, came in zip(records, found, strict=True):
        question = tokenizer.apply_chat_template(record["messages"][:-1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
        text, ended = by_hand(folder / model, prompt)
        assert came == record | {"answers": [text], "ended": [ended]}


def test_a_model_that_learnt_its_answers_gives_them(folder, tmp_path):
    """Ends are found: a model of one token that always says the end of the turn."""
    target = tmp_path / "ends"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=torch.float32)
    tokenizer = load_tokenizer(folder / "untied")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1
        for sign, ids in ((1, [tokenizer.eos_token_id]), (-1, [tokenizer.eos_token_id + 1])):
            model.lm_head.weight[ids, 0] = sign * 50.0
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    generator = Generator(target, tokenizer)
    # Whichever sign the first coordinate has: one of the two tokens, each time.
    found = {tuple(a) for a in generator.answers([[5], [6, 7]], Sampling(max_new_tokens=3), 0)[0]}
    assert found <= {("", True), (tokenizer.decode([tokenizer.eos_token_id + 1] * 3, skip_special_tokens=True), False)}


def test_samples_are_drawn_from_the_softmax(folder):
    """2,000 draws of one token at temperature 2, against the softmax of transformers' logits; of top-k alone."""
    prompt = [3, 4, 5]
    tokenizer = load_tokenizer(folder / "untied")
    generator = Generator(folder / "untied", tokenizer)
    with torch.no_grad():
        expected = (generator.model(torch.tensor([prompt])).logits[0, -1].double() / 2).softmax(-1)

    drawn = generator.answers([prompt], Sampling(temperature=2.0, samples=2000, max_new_tokens=1), seed=1)[0]
    texts = [a.text for a in drawn]
    special = set(tokenizer.all_special_ids)
    likely = [i for i in expected.argsort(descending=True).tolist() if i < len(tokenizer) and i not in special][:5]
    for token in likely:
        text = tokenizer.decode([token])
        p = sum(expected[i].item() for i in range(len(tokenizer)) if i not in special and tokenizer.decode([i]) == text)
        # Five standard deviations of a share of 2,000 draws.
        assert abs(texts.count(text) / 2000 - p) < 5 * (p * (1 - p) / 2000) ** 0.5 + 1e-9

    least = generator.answers([prompt], Sampling(temperature=2.0, samples=500, top_k=2, max_new_tokens=1), seed=1)[0]
    two = {tokenizer.decode([i], skip_special_tokens=True) for i in expected.topk(2).indices.tolist()}
    assert {a.text for a in least} <= two


def test_the_same_seed_gives_the_same_answers_and_another_one_others(folder):
    drawn = [answer(folder, "--temperature", 1, "--samples", 3, "--seed", seed) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(record["answers"]) == len(record["ended"]) == 3 for record in drawn[0])


@pytest.mark.parametrize("done", [1, 4, 6])
def test_a_run_that_was_ended_goes_on_with_the_same_answers(folder, monkeypatch, done):
    """Ended behind any record, within a batch of 4 too, as a full disk would."""
    words = ["--temperature", 1, "--batch-size", 4]
    whole = answer(folder, *words)
    out = folder / f"ended-{done}.jsonl"
    append = ResumableLines.append

    def cut(self, lines):
        append(self, list(lines)[:done])
        raise ValueError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(ResumableLines, "append", cut)
        with pytest.raises(ValueError, match="no space left"):
            answer(folder, *words, out=out.name)
    assert not out.exists()
    assert answer(folder, *words, out=out.name) == whole


def test_a_megatron_checkpoint_and_adapters_answer_as_what_they_are_exported_to(folder, tmp_path):
    plain, of_checkpoint, of_adapters, of_merged, refused = run_ranks(1, _checkpoints, [folder, tmp_path], timeout=400)[
        0
    ]
    assert [r["answers"] for r in of_checkpoint] == [r["answers"] for r in plain]
    assert [r["answers"] for r in of_adapters] == [r["answers"] for r in of_merged] != [r["answers"] for r in plain]
    assert "generate: error: " in refused and "nowhere" in refused
    assert not list(folder.glob(".generate-*"))


def _checkpoints(folder, work):
    """Answers of a model, of the same as a checkpoint, of a checkpoint of adapters, and of these merged; a refusal."""
    from megatron_reset import reset

    from qtarget_megatron import finetune

    source = folder / "tied"
    plain = answer(folder, model="tied")
    assert convert_hf.main(["import", "--hf-model", str(source), "--save", str(work / "ckpt")]) == 0
    reset()
    of_checkpoint = answer(folder, "--load", work / "ckpt", model="tied")

    adapters = write_adapters(work / "adapters", source, Lora(rank=2, alpha=8.0, targets=("q", "v", "gate", "down")))
    words = f"--hf-model {source} --sft-train {folder / 'data.jsonl'} --lora-from {adapters} --save {work / 'saved'}"
    words += f" --save-hf {work / 'merged'} --lora-merge --seq-length 32 --micro-batch-size 1 --global-batch-size 2"
    assert finetune.main([*words.split(), "--train-iters", "1", "--lr", "1e-3"]) == 0
    of_adapters = answer(folder, "--load", work / "saved", model="tied")
    of_merged = answer(work, model="merged", data=folder / "data.jsonl")

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        answer(folder, "--load", work / "nowhere", model="tied", code=2)
    return plain, of_checkpoint, of_adapters, of_merged, printed.getvalue()


# ---- what is asked


def test_a_prompt_is_what_training_reads_before_the_answer():
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    for record in (
        chat("s:S", "u:Hi", "a:One"),
        {"prompt": "2 + 2 =", "completion": " 4"},
        {"instruction": "Add", "input": "2 and 2", "output": "4"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "One"}]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    ):
        sample = encode(tokenizer, record, 4096)
        first = int(sample.supervised.argmax())
        assert prompt_ids(tokenizer, record) == sample.input_ids[:first].tolist(), record


def test_only_the_last_answer_is_left_out():
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    talk = chat("u:Hi", "a:One", "u:And?", "a:Two")
    asked = tokenizer.decode(prompt_ids(tokenizer, talk))
    assert asked.endswith("And?<|im_end|>\n<|im_start|>assistant\n") and "One" in asked and "Two" not in asked
    assert prompt_ids(tokenizer, {"messages": talk["messages"][:-1]}) == prompt_ids(tokenizer, talk)


@pytest.mark.parametrize(
    ("without", "with_answer"),
    [
        ({"prompt": "2 + 2 ="}, {"prompt": "2 + 2 =", "completion": "5"}),
        ({"instruction": "Add", "input": "2 and 2"}, {"instruction": "Add", "input": "2 and 2", "output": "5"}),
        (chat("u:Hi"), chat("u:Hi", "a:One")),
    ],
)
def test_questions_need_no_answer(folder, without, with_answer):
    found = []
    for name, record in (("without", without), ("with", with_answer)):
        (folder / f"{name}.jsonl").write_text(json.dumps(record | {"id": 7}) + "\n")
        (came,) = answer(folder, data=f"{name}.jsonl")
        assert came["id"] == 7
        found.append(came["answers"])
    assert found[0] == found[1]


# ---- what is refused


@pytest.mark.parametrize(
    ("record", "words", "message"),
    [
        (chat("a:One"), [], 'bad.jsonl:1: "messages": expected a question before the answer, got the answer alone'),
        ({"prompt": ""}, [], "bad.jsonl:1: the question has no tokens: expected one at least"),
        ({"text": "no form"}, [], 'expected "messages", or "prompt" and "completion"'),
        ({"input_ids": [5], "labels": [-100]}, [], "expected a target at least, whose answer is asked for"),
        ({"prompt": "a " * 70}, [], "no token of an answer fits behind it"),
        ({"prompt": "a"}, ["--top-p", 0.5], "top-p 0.5: a greedy answer is the same each time"),
        ({"prompt": "a"}, ["--temperature", -1], "temperature: expected 0 or more, got -1"),
        ({"prompt": "a"}, ["--temperature", 1, "--samples", 0], "samples: expected 1 or more, got 0"),
        ({"prompt": "a"}, ["--batch-size", 0], "--batch-size: expected 1 or more, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(folder, capfd, record, words, message):
    (folder / "bad.jsonl").write_text(json.dumps(record) + "\n")
    answer(folder, *words, data="bad.jsonl", out="bad-out.jsonl", code=2)
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and message in errors[0], errors
    assert not (folder / "bad-out.jsonl").exists()


def test_answers_are_not_written_over(folder, capfd):
    (folder / "answered.jsonl").write_text(json.dumps({"prompt": "a", "answers": ["b"]}) + "\n")
    words = ["--hf-model", folder / "untied", "--data", folder / "answered.jsonl", "--out", folder / "never.jsonl"]
    assert generate.main([str(word) for word in words]) == 2
    assert 'the record has "answers" already: give --overwrite' in capfd.readouterr().err
