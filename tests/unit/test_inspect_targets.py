"""The command inspect_targets: figures that hold, a page that asks nobody for anything, a picture that can be read."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import transformers
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from small_tokenizers import CHATML, byte_tokenizer, metaspace_tokenizer
from torch.nn import functional as F

from qtarget_megatron.commands import inspect_targets, targets_picture
from qtarget_megatron.data import encode, load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert('1 & 2')</script>\n\t$x^2$ 日 @@DATA@@ </script>"
CHOSEN = ["sft", "dft", "target-sft:eta=0.3", "weighted-sft", "eaft:k=20,exponent=2.0"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """student, teacher; other: a teacher with other tokens; data.jsonl."""
    folder = tmp_path_factory.mktemp("inspect")
    generator = torch.Generator().manual_seed(5)
    for name, tokenizer in {
        "student": byte_tokenizer(CHATML, eos="<|im_end|>"),
        "teacher": byte_tokenizer(CHATML, eos="<|im_end|>"),
        "other": byte_tokenizer(CHATML, eos="<|im_end|>", size=300),
        "padded": byte_tokenizer(CHATML, eos="<|im_end|>"),
    }.items():
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer) + (64 if name == "padded" else 3),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=512,
        )
        model = transformers.LlamaForCausalLM(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "no-model").mkdir()
    byte_tokenizer(CHATML).save_pretrained(folder / "no-model")
    turns = [("user", "Hi"), ("assistant", "The capital"), ("user", "More <b>?"), ("assistant", HOSTILE)]
    speakers = {"user": "human", "assistant": "gpt"}
    records = [
        {"conversations": [{"from": speakers[role], "value": text} for role, text in talk], "weight": 1.5}
        for talk in (turns[:2], turns, [*turns[:1], ("assistant", "  ")])
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def run(workspace, *words, model="student", objectives=()) -> int:
    chosen = [word for objective in objectives for word in ("--objective", objective)]
    return inspect_targets.main([str(word) for word in ("--hf-model", workspace / model, *chosen, *words)])


@pytest.fixture(scope="module")
def written(workspace):
    out = workspace / "out"
    data = ("--data", workspace / "data.jsonl", "--index", 1)
    assert run(workspace, "--teacher-hf", workspace / "teacher", *data, "--out", out, objectives=CHOSEN) == 0
    return out


@pytest.fixture(scope="module")
def report(written):
    return json.loads((written / "targets.json").read_text(encoding="utf-8"))


def rows_of(directory, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model(torch.tensor([ids])).logits[0].double().detach()


def test_every_figure_of_a_token_recomputed(workspace, report):
    """From transformers' logits of the whole sequence, autograd of the definitions and plain softmax."""
    ids = [one["id"] for one in report["sequence"]]
    row = 40
    place = report["sequence"][row]["token"]
    token = report["tokens"][place]
    assert (token["position"], token["id"]) == (row - 1, ids[row])
    z, t = (rows_of(workspace / name, ids)[row - 1] for name in ("student", "teacher"))
    p, y = z.softmax(-1), ids[row]
    assert token["p"] == pytest.approx(p[y].item(), rel=1e-4)
    assert token["log_p"] == pytest.approx(p[y].log().item(), rel=1e-4)
    assert token["entropy"] == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)
    kept = z.topk(20).values.softmax(-1)
    h = (-(kept * kept.log()).sum() / torch.tensor(20.0).log()).item() ** 2
    onehot, residual = F.one_hot(torch.tensor(y), len(z)), (0.7 * z + 0.3 * t).softmax(-1)
    weights = {"sft": 1.0, "dft": p[y].item(), "target-sft": p[y].item(), "weighted-sft": 1.5, "eaft": h}
    for row_of_table, reading in zip(report["objectives"], token["objectives"], strict=True):
        name = row_of_table["name"]
        c = weights[name]
        rest = residual if name == "target-sft" else p
        q = c * onehot + (1 - c) * rest
        total = 1.0 if name == "target-sft" else c
        loss = -c * p[y].log()
        if name == "target-sft":
            loss = loss - (1 - c) * (residual * p.log()).sum()
        expected = {
            "loss": loss.item(),
            "trust": c,
            "residual_mass": total - c,
            "total_mass": total,
            "normalised_trust": c / total,
            "moved_mass": (q - p).abs().sum().item() / 2,
            "label_probability": q[y].item(),
        }
        for key, value in expected.items():
            assert reading[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)
        assert reading["valid"] == bool((q >= 0).all())
        assert {y, *p.topk(5).indices.tolist()} <= {one["id"] for one in reading["alternatives"]}
        for one in reading["alternatives"]:
            assert one["p"] == pytest.approx(p[one["id"]].item(), rel=1e-4, abs=1e-7)
            assert one["q"] == pytest.approx(q[one["id"]].item(), rel=1e-4, abs=1e-6)


def test_the_sequence_holds_every_token_and_marks_the_supervised(workspace, report):
    record = json.loads((workspace / "data.jsonl").read_text().splitlines()[1])
    sample = encode(load_tokenizer(workspace / "student"), record, 512)
    last = int(sample.supervised.nonzero()[0][-1])
    assert [one["id"] for one in report["sequence"]] == sample.input_ids[: last + 1].tolist()
    marked = [one["token"] for one in report["sequence"] if one["token"] is not None]
    assert marked == list(range(report["num_tokens"])) == list(range(int(sample.supervised.sum())))
    assert [one["token"] is not None for one in report["sequence"]] == sample.supervised[: last + 1].tolist()
    assert HOSTILE[:8] in "".join(one["text"] for one in report["sequence"])
    assert (report["model"], report["teacher"]) == ("student", "teacher")
    assert (report["source"], report["truncated"]) == ("data.jsonl, record 1", False)
    assert report["objectives"][4]["objective"] == "eaft(k=20, normalizer=None, exponent=2.0)"


def test_the_page_asks_nobody_for_anything(written):
    page = (written / "targets.html").read_text(encoding="utf-8")
    found = re.findall(
        r"https?://|//[a-z]|\bsrc\s*=|\bhref\s*=|@import|url\(|<link|<iframe|<img|fetch\(|XMLHttp|import\(", page
    )
    assert found == []
    assert "default-src 'none'" in page


def test_the_samples_text_is_never_markup(written, report):
    page = (written / "targets.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts == ['<script type="application/json" id="data">', "<script>"]
    assert page.count("</script") == 2 and "<b>" not in page and "@@" not in page.split('id="data">')[0]
    data = page.split('id="data">')[1].split("</script>")[0]
    assert "<" not in data and "&" not in data
    inside = json.loads(data)
    assert [one["text"] for one in inside["sequence"]] == [
        inspect_targets.visible(o["text"]) for o in report["sequence"]
    ]
    assert "".join(one["text"] for one in inside["sequence"]).count("⏎⇥") == 1
    # The script only ever sets text, and names elements that are there.
    code = page.split("<script>")[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", code)
    for name in re.findall(r'getElementById\("(\w+)"\)', code):
        assert f'id="{name}"' in page, name
    for row in report["objectives"]:
        assert f"<td>{row['mean_trust']:.4f}</td>" in page


def test_the_picture_shows_the_trust_in_colours(written):
    pixels = image.imread(written / "targets.png")[..., :3]
    height, width, _ = pixels.shape
    assert width == 2025 and height > 1000
    colours = {tuple(colour) for colour in (pixels[::3, ::3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert len(colours) > 100
    # sft's cells have trust 1: the ramp's last colour, as an area.
    full = tuple(int(targets_picture.TRUST_COLOURS[-1][at : at + 2], 16) for at in (1, 3, 5))
    assert ((pixels * 255).round().astype(int) == full).all(-1).sum() > 1000


def shown(report):
    copy = inspect_targets.with_visible_text(report)
    for row in copy["objectives"]:
        row["label"] = inspect_targets.label(row)
    return copy


def test_no_text_of_the_picture_lies_over_another(report):
    with matplotlib.rc_context({"font.family": targets_picture.FONT, "text.parse_math": False}):
        figure = targets_picture.picture(shown(report))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a missing character is a warning
            FigureCanvasAgg(figure).draw()
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        x0, y0, x1, y1 = np.array([text.get_window_extent().extents for text in texts]).T
    assert len(texts) > 300
    assert min(x0.min(), y0.min()) >= 0 and x1.max() <= figure.bbox.x1 and y1.max() <= figure.bbox.y1
    across = np.minimum.outer(x1, x1) - np.maximum.outer(x0, x0)
    along = np.minimum.outer(y1, y1) - np.maximum.outer(y0, y0)
    # Boxes may touch, by a pixel at 100 per inch.
    over = np.argwhere(np.triu((across > 1) & (along > 1), k=1))
    assert [(texts[i].get_text(), texts[j].get_text()) for i, j in over] == []


def test_objectives_whose_target_is_no_distribution(workspace, tmp_path, capsys):
    """M = 0, weights above 1, negative entries: undefined figures are null, and everything is drawn."""
    chosen = ["gem", "kd:temperature=2", "beyond-log:alpha=-0.5", "profit:tau=0.9"]
    sample = ("--prompt", "a", "--completion", "user $x$ Paris.", "--top", 2)
    assert run(workspace, "--teacher-hf", workspace / "teacher", *sample, "--out", tmp_path, objectives=chosen) == 0
    text = (tmp_path / "targets.json").read_text(encoding="utf-8")
    assert not re.search("NaN|Infinity", text)
    found = json.loads(text)
    gem, _, beyond, profit = found["objectives"]
    assert (gem["mean_total_mass"], gem["mean_trust"]) == (0, 1)
    assert beyond["mean_trust"] > 1 and beyond["valid_share"] < 1 and profit["low_trust_share"] > 0
    assert found["tokens"][0]["objectives"][0]["normalised_trust"] is None
    assert image.imread(tmp_path / "targets.png").shape[1] == 2025
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[:2] == ["gem(beta=0.7,", "h=linear)"] and "wrote" in printed[-1]


def test_defaults_and_limits(workspace, tmp_path):
    sample = ("--prompt", "What is", "--completion", "The capital is Paris. The capital is Paris.")
    assert run(workspace, *sample, "--max-tokens", 3, "--top", 1, "--out", tmp_path / "a") == 0
    found = json.loads((tmp_path / "a" / "targets.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in found["objectives"]] == ["sft", "dft"] and found["teacher"] is None
    assert found["num_tokens"] == 3 < found["supervised_tokens"]
    assert found["sequence"][-1]["token"] == 2
    whole = ("--teacher-hf", workspace / "student", "--seq-length", 12, "--out", tmp_path / "b")
    assert run(workspace, *sample, *whole) == 0
    found = json.loads((tmp_path / "b" / "targets.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in found["objectives"]] == ["sft", "dft", "target-sft"]
    assert found["truncated"] and len(found["sequence"]) == 13
    # A teacher that is the student itself leaves dft's gradient.
    dft, target = (found["tokens"][1]["objectives"][i] for i in (1, 2))
    assert target["moved_mass"] == pytest.approx(dft["moved_mass"])


def test_a_tokens_text():
    tokenizer = byte_tokenizer(CHATML)
    texts = [inspect_targets.token_text(tokenizer, i) for i in tokenizer("is\n 日")["input_ids"]]
    assert texts == ["is", "\n", " ", "\\xe6", "\\x97", "\\xa5"]
    assert inspect_targets.token_text(tokenizer, 5000) == "<id 5000>"
    assert inspect_targets.token_text(tokenizer, tokenizer.convert_tokens_to_ids("<|im_end|>")) == "<|im_end|>"
    pieces = metaspace_tokenizer(CHATML)
    texts = [inspect_targets.token_text(pieces, i) for i in pieces("The é")["input_ids"]]
    assert texts[0] == " Th" and texts[-2:] == ["<0xC3>", "<0xA9>"]
    assert inspect_targets.visible(" a\n\t\x07") == "␣a⏎⇥\\u0007"


ONE = ("--prompt", "1", "--completion", "2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*ONE, "--objective", "sfd"), "unknown objective 'sfd': expected one of"),
        ((*ONE, "--objective", "target-sft:eta=2"), "eta must be a number in"),
        ((*ONE, "--objective", "target-sft"), "needs a second model: give --teacher-hf DIR"),
        ((*ONE, "--objective", "sft:eta=1"), "no parameter 'eta'"),
        ((*ONE, "--objective", "sft", "--teacher-hf", "{}/teacher"), "--teacher-hf is read by none"),
        ((*ONE, "--teacher-hf", "{}/other"), "vocabularies differ"),
        ((*ONE, "--teacher-hf", "{}/padded"), "has a vocabulary of"),
        ((*ONE, "--objective", "weighted-sft"), 'the objective needs "weight"'),
        ((*ONE, "--top", "0"), "--top must be 1 or more, got 0"),
        ((*ONE, "--data", "{}/data.jsonl"), "got both"),
        ((*ONE, "--index", "1"), "--index chooses a record of --data"),
        (("--prompt", "1"), "expected --prompt and --completion, or --data"),
        (("--data", "{}/data.jsonl", "--index", "3"), "--index must be in 0..2"),
        (("--data", "{}/data.jsonl", "--index", "2"), "no token is supervised within --seq-length 1024"),
        (("--data", "{}/missing.jsonl"), "No such file"),
        (
            ("--data", "{}/data.jsonl", "--data-format", "alpaca"),
            "data.jsonl:1: .*form alpaca, .*got the form sharegpt",
        ),
        (("--data", "{}/data.jsonl", "--objective", "psft:refresh=0"), 'data.jsonl:1: .*"old_log_prob"'),
        ((*ONE, "--hf-model", "{}/missing"), "expected a directory"),
        ((*ONE, "--hf-model", "{}/no-model"), "transformers cannot load a model"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(workspace, tmp_path, capsys, words, message):
    out = tmp_path / "out"
    assert run(workspace, *(word.format(workspace) for word in words), "--out", out) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err), printed.err
    assert printed.err.startswith("inspect: error: ") and printed.err.count("\n") == 1
    assert printed.out == "" and not out.exists()


def test_matplotlib_is_asked_for_before_anything_is_loaded(workspace, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(workspace, *ONE, "--out", tmp_path / "out", model="no-model") == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_older_files_stay_until_all_new_ones_are_complete(workspace, tmp_path, monkeypatch):
    for name in inspect_targets.FILES:
        (tmp_path / name).write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr("qtarget_megatron.commands.targets_page.page", lambda report: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(workspace, *ONE, "--out", tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(inspect_targets.FILES, "old")
    assert run(workspace, *ONE, "--out", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(inspect_targets.FILES)
    assert (tmp_path / "targets.png").read_bytes().startswith(b"\x89PNG")


def test_the_tool_runs_by_its_path(tmp_path):
    words = [sys.executable, REPOSITORY / "tools" / "inspect_targets.py"]
    done = subprocess.run([*words, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0 and "Q = p - g" in done.stdout and "--max-tokens" in done.stdout
    words += ["--hf-model", "x", "--out", "y", *ONE, "--objective", "kd"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
