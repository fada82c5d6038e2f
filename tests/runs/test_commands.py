"""The commands of the package: what texts name exists, each says its version, and a checkout has a tool for each."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from launching import REPOSITORY

from qtarget_megatron import __version__, finetune
from qtarget_megatron.commands import main as qtarget
from qtarget_megatron.commands.main import COMMANDS as SUBCOMMANDS

COMMANDS = ["cache_teacher", "convert_hf", "inspect_targets", "plan", "score", "verify_parallel"]


def test_texts_name_commands_that_exist_wherever_the_package_is():
    """An installed package has no tools/: its own texts send nobody there."""
    files = [*(REPOSITORY / "qtarget_megatron").rglob("*.py"), *(REPOSITORY / "examples").rglob("*.*")]
    files += [*(REPOSITORY / "tools").glob("*.py"), *(REPOSITORY / "docs").glob("*.md")]
    files += [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    named = set()
    for path in files:
        if path.suffix in (".py", ".md", ".sh"):
            text = path.read_text()
            named |= set(re.findall(r"(?<![\w-])qtarget ([a-z][a-z-]+)", text))
            named |= {name.replace("_", "-") for name in re.findall(r"-m qtarget_megatron\.(\w+)", text)}
            if path.is_relative_to(REPOSITORY / "qtarget_megatron"):
                assert not re.search(r"tools/[a-z]\w*\.py|-m tools\.|qtarget_megatron\.commands\.\w+ --", text), path
    assert set(SUBCOMMANDS) <= named <= {*SUBCOMMANDS, "completion"}, named.symmetric_difference(SUBCOMMANDS)


def run(*words, **environment):
    words = [sys.executable, "-m", *words]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | environment)


def test_each_subcommand_is_a_module_of_its_name():
    for name, command in SUBCOMMANDS.items():
        assert importlib.util.find_spec(command.module) is not None
        assert importlib.util.find_spec(f"qtarget_megatron.{name.replace('-', '_')}") is not None


@pytest.mark.parametrize("words", [["qtarget_megatron", "check"], ["qtarget_megatron.check"]], ids=" ".join)
def test_a_subcommand_gets_the_words_behind_it(words):
    done = run(*words, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: qtarget check [-h]"), done.stderr
    done = run(*words, "--hf-modle", "X")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        "check: error: the following arguments are required: --hf-model; --hf-modle: did you mean --hf-model?"
    )


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--help"], 0, "    cache-teacher   keep a teacher's largest probabilities for training\n"),
        (["--version"], 0, f"qtarget_megatron {__version__}, torch "),
        ([], 2, "qtarget: error: expected a command: qtarget --help lists them\n"),
        (["cache_teacher"], 2, "unknown command 'cache_teacher' (did you mean cache-teacher?)"),
        (["completion"], 2, "qtarget: error: completion: expected one of bash, zsh"),
    ],
)
def test_the_command_itself(words, code, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qtarget", *words])
    if code == 0:
        qtarget.main()
    else:
        with pytest.raises(SystemExit) as ended:
            qtarget.main()
        assert ended.value.code == code
    printed = capsys.readouterr()
    assert text in (printed.err if code else printed.out)
    assert code == 0 or printed.err.count("\n") == 1


def test_a_shell_completes_subcommands_and_flags(tmp_path):
    from qtarget_megatron.commands import completion
    from qtarget_megatron.commands.main import COMMANDS

    script = tmp_path / "qtarget"
    script.write_text(completion.script("bash", {name: command.summary for name, command in COMMANDS.items()}))
    asked = {
        "qtarget cache-t": "cache-teacher",
        "qtarget score --temp": "--temp",
        "qtarget finetune --obj": "--objective",
    }
    for line, expected in asked.items():
        words = shlex.join(line.split())
        program = f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(line.split()) - 1}; _shtab_qtarget; "
        done = subprocess.run(
            ["bash", "-c", program + 'printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True, timeout=60
        )
        assert expected in done.stdout.split(), done.stderr


def test_each_command_has_a_tool_of_a_few_lines():
    for name in COMMANDS:
        tool = (REPOSITORY / "tools" / f"{name}.py").read_text()
        assert f'runpy.run_module("qtarget_megatron.commands.{name}", run_name="__main__"' in tool
        assert len(tool.splitlines()) < 12


@pytest.mark.parametrize("name", ["finetune", "generate", "import_teacher", *COMMANDS])
def test_a_version_is_one_line(name, capsys):
    command = finetune if name == "finetune" else importlib.import_module(f"qtarget_megatron.commands.{name}")
    with pytest.raises(SystemExit) as ended:
        command.main(["--version"])
    megatron = importlib.metadata.version("megatron-core")
    expected = f"qtarget_megatron {__version__}, torch {torch.__version__}, megatron-core {megatron}\n"
    assert (ended.value.code, capsys.readouterr().out) == (0, expected)
