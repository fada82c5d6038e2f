"""The commands of the package: what texts name exists, each says its version, and a checkout has a tool for each."""

import importlib
import importlib.metadata
import re

import pytest
import torch
from launching import REPOSITORY

from qtarget_megatron import __version__, finetune

COMMANDS = ["cache_teacher", "convert_hf", "inspect_targets", "plan", "score", "verify_parallel"]


def test_texts_name_commands_that_exist_wherever_the_package_is():
    """An installed package has no tools/: its own texts send nobody there."""
    files = [*(REPOSITORY / "qtarget_megatron").rglob("*.py"), *(REPOSITORY / "examples").rglob("*.*")]
    files += [*(REPOSITORY / "tools").glob("*.py"), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    named = set()
    for path in files:
        if path.suffix in (".py", ".md", ".sh"):
            text = path.read_text()
            named |= set(re.findall(r"qtarget_megatron\.commands\.(\w+)", text))
            if path.is_relative_to(REPOSITORY / "qtarget_megatron"):
                assert not re.search(r"tools/[a-z]\w*\.py|-m tools\.", text), path
    assert set(COMMANDS) <= named
    for name in named - {"NAME"}:
        assert (REPOSITORY / "qtarget_megatron" / "commands" / f"{name}.py").is_file(), name


def test_each_command_has_a_tool_of_a_few_lines():
    for name in COMMANDS:
        tool = (REPOSITORY / "tools" / f"{name}.py").read_text()
        assert f'runpy.run_module("qtarget_megatron.commands.{name}", run_name="__main__"' in tool
        assert len(tool.splitlines()) < 12


@pytest.mark.parametrize("name", ["finetune", *COMMANDS])
def test_a_version_is_one_line(name, capsys):
    command = finetune if name == "finetune" else importlib.import_module(f"qtarget_megatron.commands.{name}")
    with pytest.raises(SystemExit) as ended:
        command.main(["--version"])
    megatron = importlib.metadata.version("megatron-core")
    expected = f"qtarget_megatron {__version__}, torch {torch.__version__}, megatron-core {megatron}\n"
    assert (ended.value.code, capsys.readouterr().out) == (0, expected)
