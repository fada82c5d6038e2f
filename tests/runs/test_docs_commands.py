"""The commands that README.md and docs/ show: each is parsed, and run on tiny models where one process does it."""

import argparse
import importlib.util
import json
import re
import shlex
import shutil
import sys
import tomllib

import pytest
import torch
from doc_pages import blocks, pages
from finetune_runs import vocabulary, write_data, write_model
from launching import REPOSITORY, Launch, run_alone, run_ranks

from qtarget_megatron.commands.main import COMMANDS

PAGES = [page for page in pages() if blocks(page, "sh")]
MADE = ("OUT", "CKPT", "CACHE", "OTHER", "BOTH", "scored.jsonl")


def commands(page, *, run=False):
    """Their words, in the order of the page; run: only those of blocks that are not marked otherwise."""
    texts = [block.text for block in blocks(page, "sh") if not (run and block.skipped)]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def of_the_package(words):
    """[command, *its words] where they start one, else None."""
    if words[0] == "qtarget":
        return words[1:]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        launcher = get_args_parser().parse_args(words[1:])
        package, _, module = launcher.training_script.partition(".")
        assert launcher.module and package == "qtarget_megatron", words
        return [module.replace("_", "-"), *launcher.training_script_args]
    return None


# ---- parsed


def faults(found):
    """What the parsers of the commands and Megatron's say of them, on a rank."""
    from qtarget_megatron.commands import completion
    from qtarget_megatron.megatron.runtime import launch
    from qtarget_megatron.megatron.training.arguments import add_arguments

    parsers = completion.parsers()
    trains = {"finetune": add_arguments, "plan": add_arguments}
    said = []
    for name, *words in found:
        if words[:1] == ["--help-objectives"]:
            words.pop(0)
        try:
            rest = parsers[name].parse_known_args(words)[1] if words and name != "finetune" else words
            if name in ("verify", "inspect"):
                own = parsers[name].parse_args(words)
                if getattr(own, "train", None):
                    launch.parse_arguments(own.train, add_arguments)
            elif rest:
                launch.parse_arguments(rest, trains.get(name, lambda parser: parser))
        except (ValueError, argparse.ArgumentError) as error:
            said.append(f"{name} {' '.join(words)}: {error}")
    return said


def test_every_flag_is_known_and_has_a_value_of_its_kind():
    known = [of_the_package(words) for page in PAGES for words in commands(page)]
    found = [words for words in known if words and words[0] in COMMANDS]
    assert {words[0] for words in found} == COMMANDS.keys()
    wrong = [
        ["finetune", "--hf-model", "X", "--learning-rate", "1"],
        ["plan", "--world-size", "x"],
        ["verify", "--lr", "1"],
        ["verify", "--train", "--hf-model", "X", "--tensor-parallel", "2"],
    ]
    said = run_ranks(1, faults, ([*found, *wrong],), megatron=True)[0]
    # The last ones show that it would be seen.
    assert len(said) == 4, said
    assert "did you mean --lr" in said[0] and "world-size" in said[1] and "unknown flag --lr" in said[2]
    assert "unknown flag --tensor-parallel" in said[3]


def test_other_programs_are_given_what_exists():
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for page in pages():
        for words in commands(page):
            if words[0] == "make":
                assert words[1:] and set(words[1:]) <= set(targets), words
            elif words[0] == "pip":
                assert words[1:3] == ["install", "."] and words[3:] in ([], ["-c", "constraints.txt"]), words
            elif words[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(words[2]) is not None, words
            else:
                name = (of_the_package(words) or [words[0]])[0]
                assert name in {*COMMANDS, "completion", "--help", "--version"}, words
        for extra in re.findall(r"pip install '\S*\[(\w+)\]'", page.read_text()):
            assert extra in project["optional-dependencies"], (page, extra)


# ---- run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """What the placeholders of the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    generator = torch.Generator().manual_seed(5)
    shape = dict(hidden_size=64, intermediate_size=64, num_attention_heads=8, max_position_embeddings=4096)
    for name, layers in (("DIR", 4), ("TEACHER_DIR", 4), ("REF", 2)):
        size = dict(vocab_size=vocabulary(), num_hidden_layers=layers)
        write_model(folder / name, "Llama", shape | size, generator)
    write_data(folder / "train.jsonl", 20, seed=3)
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    # score adds the side inputs.
    lines = [json.dumps({"messages": record["messages"]}) for record in records]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("chat", "maths", "held-out", "maths-valid"):
        shutil.copy(folder / "train.jsonl", folder / f"{name}.jsonl")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    return folder


def remove(*paths):
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def run(words, folder):
    if words[0] != "verify":
        return run_alone(["qtarget_megatron", *words], timeout=300, folder=folder)
    # What is forked has the CPU platform on, which verify, who uses none, takes for a GPU.
    with Launch([sys.executable, "-m", "qtarget_megatron", *words], {"PYTHONPATH": str(REPOSITORY)}, folder) as launch:
        return launch.wait(timeout=120)


RUN = [page for page in PAGES if any(words[0] == "qtarget" for words in commands(page, run=True))]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_commands_of_a_page(workspace, page):
    """One after another, in one folder, which has the files that the page's Python blocks are named after."""
    remove(*(workspace / name for name in MADE))
    for block in blocks(page, "python"):
        if named := re.match(r"# (\w+\.py)\b", block.text):
            (workspace / named[1]).write_text(block.text)
    for words in commands(page, run=True):
        if words[0] == "qtarget":
            remove(workspace / "OUT")  # each of them starts with none
            done = run(words[1:], workspace)
            assert done.returncode == 0, f"{words}:\n{done.stdout[-3000:]}"
        else:
            assert words[0] in ("make", "pip"), f"{words} is neither run nor marked '<!-- not run: why -->'"


def test_every_command_is_run_somewhere():
    assert {words[1] for page in RUN for words in commands(page, run=True) if words[0] == "qtarget"} >= COMMANDS.keys()
