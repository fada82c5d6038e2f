"""See what an objective asks of a model: for each token of one sample, how far it trusts the label and where it wants
the rest of the probability.

    # what sft and dft would pull the model to, on one completion
    qtarget inspect --hf-model DIR --prompt "2 + 3 =" --completion " 5" --out OUT

    # several objectives, with parameters, a teacher, and record 4 of a training file
    qtarget inspect --hf-model DIR --teacher-hf TEACHER_DIR \\
        --data train.jsonl --index 4 --objective sft --objective eaft:k=20 --objective target-sft:eta=0.3 --out OUT

OUT/targets.html   one self-contained page: choose an objective, point at a token to see the alternatives
OUT/targets.png    the same at a glance: trust by objective and token, p(y), entropy, the most-moved tokens
OUT/targets.json   the figures (qtarget_megatron.inspection.inspect says what each is)

With p the model's distribution, an objective with logit gradient g pulls it to Q = p - g. Q gives the observed token y
the share c_y, its trust; the objective's residuals (a teacher, the uniform, ...) the residual mass; and leaves 1 - M of
itself as it is. Training logs c_y / M as trust, which is the same where the total mass M is 1.

Runs on the CPU in float32, from local directories. An objective with side inputs (weight, critical, old_log_prob) reads
them from the record's fields.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from qtarget_megatron.commands.parsers import command_parser
from qtarget_megatron.data.forms import add_data_format

FILES = ("targets.png", "targets.html", "targets.json")
# Characters that would show as nothing, or break the line.
_SHOWN = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u200b": "\\u200b", "\ufeff": "\\ufeff"}


def main(argv: list[str] | None = None) -> int:
    """Write the three files; returns the process's exit code: 0 done, 2 bad input."""
    try:
        args = command_line().parse_args(argv)
        report = inspect_sample(args)
        write(report, args.out)
    except ValueError as error:
        # Bad input is one line; a fault inside torch or transformers keeps its traceback.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.is_relative_to(Path(__file__).parent.parent):
            raise
        print(f"inspect: error: {error}", file=sys.stderr)
        return 2
    print(_table(report))
    print(f"inspect: wrote {', '.join(str(args.out / name) for name in FILES)}")
    return 0


def inspect_sample(args: argparse.Namespace) -> dict[str, Any]:
    """What inspect() finds in the sample, and with it: model, teacher, source (names of what was read),
    supervised_tokens (of the whole sample, of which num_tokens are shown), truncated (cut to --seq-length), and
    sequence: id, text and token (index into tokens, None where not supervised) of all up to the last token shown.

    ValueError for bad input, everything cheap before the models are loaded.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("targets.png is drawn by matplotlib, which is not installed: pip install matplotlib")
    for flag in ("top", "max_tokens", "seq_length"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be 1 or more, got {getattr(args, flag)}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: expected a directory, got a file")
    chosen = _objectives(args)
    names = list(dict.fromkeys(name for objective in chosen for name in objective.token_inputs))

    # Seconds of imports that --help and a mistyped objective do not spend.
    import torch

    from qtarget_megatron.data import IGNORE_INDEX, compare_tokenizers, load_tokenizer
    from qtarget_megatron.huggingface import transformers_logits
    from qtarget_megatron.inspection import inspect

    tokenizer = load_tokenizer(args.hf_model)
    sample, source = _sample(args, tokenizer, names)
    rows = sample.supervised.nonzero()[0][: args.max_tokens]
    if len(rows) == 0:
        raise ValueError(f"{source}: no token is supervised within --seq-length {args.seq_length}")
    ids = sample.input_ids[: rows[-1] + 1].tolist()
    labels = torch.full((len(ids) - 1,), IGNORE_INDEX)
    labels[rows - 1] = torch.tensor(ids)[rows]
    inputs = {name: torch.from_numpy(values[1 : len(ids)]) for name, values in sample.inputs.items()}
    same = args.teacher_hf is not None and args.teacher_hf.resolve() == args.hf_model.resolve()
    if args.teacher_hf is not None and not same:
        compare_tokenizers(tokenizer, load_tokenizer(args.teacher_hf))

    logits = transformers_logits(args.hf_model, ids[:-1])
    teacher_logits = None
    if args.teacher_hf is not None:
        teacher_logits = logits if same else transformers_logits(args.teacher_hf, ids[:-1])
        if teacher_logits.shape != logits.shape:
            raise ValueError(
                f"--teacher-hf {args.teacher_hf} has a vocabulary of {teacher_logits.shape[-1]}, the student one of "
                f"{logits.shape[-1]}: use a teacher with the student's vocabulary"
            )

    def decode(index: int) -> str:
        return token_text(tokenizer, index)

    found = inspect(
        chosen, logits, labels, decode=decode, teacher_logits=teacher_logits, token_inputs=inputs, top=args.top
    )
    place = {int(row): number for number, row in enumerate(rows)}
    return {
        "model": args.hf_model.resolve().name,
        "teacher": args.teacher_hf.resolve().name if args.teacher_hf else None,
        "source": source,
        "supervised_tokens": int(sample.supervised.sum()),
        "truncated": sample.truncated,
        **found,
        "sequence": [{"id": i, "text": decode(i), "token": place.get(row)} for row, i in enumerate(ids)],
    }


def write(report: dict[str, Any], out: Path) -> None:
    """The three files, each under its name only once all are complete."""
    from qtarget_megatron.commands.targets_page import page
    from qtarget_megatron.commands.targets_picture import draw

    out.mkdir(parents=True, exist_ok=True)
    shown = with_visible_text(report)
    for row in shown["objectives"]:
        row["label"] = label(row)
    with tempfile.TemporaryDirectory(dir=out, prefix=".incomplete-") as folder:
        draw(shown, Path(folder) / "targets.png")
        (Path(folder) / "targets.html").write_text(page(shown), encoding="utf-8")
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        (Path(folder) / "targets.json").write_text(text + "\n", encoding="utf-8")
        for name in FILES:
            os.replace(Path(folder) / name, out / name)


def label(row: dict[str, Any]) -> str:
    """An objective's name with the parameters that are set: sft, eaft(k=20, exponent=1.0)."""
    parameters = ", ".join(f"{key}={value}" for key, value in row["parameters"].items() if value is not None)
    return f"{row['name']}({parameters})" if parameters else row["name"]


def token_text(tokenizer: Any, index: int) -> str:
    """The text that a token stands for; of a part of a character its bytes, and of what has no text its name."""
    text = tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    name = tokenizer.convert_ids_to_tokens(index)
    if name is None:
        return f"<id {index}>"
    if "\ufffd" in text and not name.startswith("<0x") and set(name) <= _BYTE_LETTERS.keys():
        return "".join(f"\\x{_BYTE_LETTERS[letter]:02x}" for letter in name)
    if not text or "\ufffd" in text:
        return name
    # Tokenizers in the style of Llama 2 drop a first token's blank.
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text


def _byte_letters() -> dict[str, int]:
    """The letters byte-level tokenizers write bytes with: printable Latin-1 is itself, the others count from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LETTERS = _byte_letters()


def visible(text: str) -> str:
    """A token's text with blanks, line breaks and control characters shown."""
    return "".join(
        _SHOWN.get(character) or (character if character.isprintable() else f"\\u{ord(character):04x}")
        for character in text
    )


def with_visible_text(data: Any) -> Any:
    """A copy of plain data in which every "text" is made visible."""
    if isinstance(data, dict):
        return {key: visible(value) if key == "text" else with_visible_text(value) for key, value in data.items()}
    return [with_visible_text(value) for value in data] if isinstance(data, list) else data


def _objectives(args: argparse.Namespace) -> list:
    from qtarget_megatron import objectives

    words = args.objective or ["sft", "dft", *(["target-sft"] if args.teacher_hf else [])]
    chosen = []
    for word in words:
        name, _, parameters = word.partition(":")
        chosen.append(objectives.from_arguments(name, parameters.split(",") if parameters else []))
    hungry = [objective for objective in chosen if objective.needs_teacher]
    if hungry and args.teacher_hf is None:
        own = ", or refresh=0" if hungry[0].refresh else ""
        raise ValueError(f"objective {hungry[0]} needs a second model: give --teacher-hf DIR{own}")
    if not hungry and args.teacher_hf is not None:
        raise ValueError("--teacher-hf is read by none of these objectives: drop it, or add one such as target-sft")
    return chosen


def _sample(args: argparse.Namespace, tokenizer: Any, names: list[str]) -> tuple[Any, str]:
    """The encoded sample and a name for it."""
    from qtarget_megatron.data import encode, encode_at, open_records

    if args.data is None:
        if args.prompt is None or args.completion is None:
            raise ValueError("expected --prompt and --completion, or --data")
        if args.index is not None:
            raise ValueError("--index chooses a record of --data, which is not given")
        record = {"prompt": args.prompt, "completion": args.completion}
        return encode(tokenizer, record, args.seq_length, names), "prompt and completion"
    if args.prompt is not None or args.completion is not None:
        raise ValueError("expected --prompt and --completion, or --data, got both")
    file, index = open_records(args.data, args.data_format), args.index or 0
    if not 0 <= index < len(file):
        raise ValueError(f"--index must be in 0..{len(file) - 1}, the records of {args.data}, got {index}")
    return encode_at(file, tokenizer, args.seq_length, index, names), f"{args.data.name}, record {index}"


def _table(report: dict[str, Any]) -> str:
    """The comparison as lines of text."""
    heads = ("mean loss", "trust c_y", "mass M", "moved mass", f"trust < {report['low_trust']:g}")
    keys = ("mean_loss", "mean_trust", "mean_total_mass", "mean_moved_mass", "low_trust_share")
    rows = report["objectives"]
    width = max(len(label(row)) for row in rows)
    lines = [f"{'':{width}}  " + "  ".join(f"{head:>11}" for head in heads)]
    for row in rows:
        values = [row[key] for key in keys]
        cells = ["undefined" if v is None else f"{v:.4f}" for v in values[:-1]] + [f"{values[-1]:.1%}"]
        lines.append(f"{label(row):{width}}  " + "  ".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def command_line() -> argparse.ArgumentParser:
    """The parser of its own flags."""
    parser = command_parser("inspect", __doc__)
    add = parser.add_argument
    add("--hf-model", type=Path, required=True, metavar="DIR", help="Hugging Face directory: model and tokenizer")
    add("--teacher-hf", type=Path, metavar="DIR", help="the second model, where an objective reads one")
    add(
        "--objective",
        action="append",
        metavar="NAME[:KEY=VALUE,...]",
        help="what to compare; give it once for each objective (default: sft, dft, and target-sft with a teacher)",
    )
    add("--prompt", metavar="TEXT", help="with --completion: the sample, in which the completion is supervised")
    add("--completion", metavar="TEXT", help="see --prompt")
    add("--data", type=Path, metavar="FILE", help="instead: a file or folder as training reads it")
    add_data_format(parser)
    add("--index", type=int, metavar="I", help="which record of --data, from 0 (default: 0)")
    add("--out", type=Path, required=True, metavar="DIR", help="where the three files go; older ones are replaced")
    add("--top", type=int, default=5, metavar="K", help="alternatives to list, under p and under Q each (default: 5)")
    add("--max-tokens", type=int, default=128, metavar="N", help="supervised tokens to show (default: 128)")
    add("--seq-length", type=int, default=1024, metavar="S", help="tokens of the sample to keep (default: 1024)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
