"""A user's file of objectives: what is said, and of which line, when it fails, and how it is verified."""

import os
import sys

import pytest

from qtarget_megatron import Objective, objectives
from qtarget_megatron.commands import verify_parallel
from qtarget_megatron.megatron.verify.problem import try_evaluate
from qtarget_megatron.objectives import registry as registry_module


@pytest.fixture(autouse=True)
def own_registry(monkeypatch, tmp_path):
    monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))
    monkeypatch.setattr(registry_module, "_EXAMPLES", dict(registry_module._EXAMPLES))
    monkeypatch.chdir(tmp_path)
    for name in ("helper", "unparsed"):  # of another test's folder
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


HELPER = "# A module of the user's own.\n\n\ndef broken():\n    return {}['missing']\n"
# What stands in the file -> its line, and what is said.
FAILURES = {
    "at import": ("\n1 / 0\n", 2, "ZeroDivisionError: division by zero"),
    "in a function of its own": ("def f():\n    return [][3]\n\n\nf()\n", 2, "IndexError: list index out of range"),
    "in a helper": ("import helper\n\nhelper.broken()\n", 3, "KeyError: 'missing' (at {folder}/helper.py:5)"),
    "in torch": ("import torch\n\ntorch.zeros(2) @ torch.zeros(3)\n", 3, "RuntimeError: "),
    "that does not parse": ("x = 1\nif x\n    pass\n", 2, "SyntaxError: expected ':'"),
    "whose import does not parse": ("import unparsed\n", 1, "SyntaxError: expected ':' (at {folder}/unparsed.py:3)"),
    "that is missing something": ("import nowhere_to_be_found\n", 1, "ModuleNotFoundError: No module named"),
    "with lines in its text": ("raise RuntimeError('one\\ntwo')\n", 1, "RuntimeError: one"),
    "that ends the program": ("import sys\n\nsys.exit('no')\n", 3, "SystemExit: no"),
}


@pytest.mark.parametrize("shown", ["relative", "in a folder", "absolute", "through a link"])
@pytest.mark.parametrize("case", FAILURES)
def test_an_error_names_the_line_of_the_file(tmp_path, case, shown):
    text, line, message = FAILURES[case]
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "unparsed.py").write_text("\n\nif 1\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text(text)
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "link.py").symlink_to("sub/mine.py")
    path = {
        "relative": "mine.py",
        "in a folder": os.path.join("sub", "..", "sub", "mine.py"),
        "absolute": str(tmp_path / "mine.py"),
        "through a link": "link.py",
    }[shown]
    with pytest.raises(ValueError) as caught:
        objectives.register_from_file(path)
    assert str(caught.value).startswith(f"{path}:{line}: {message.format(folder=tmp_path)}")
    assert "\n" not in str(caught.value)


OWN = """
from qtarget_megatron import Objective, objectives


@objectives.register("mine"EXAMPLE)
def mine(power: float) -> Objective:
    def evaluate(stats, inputs):
        weight = stats.p**powr
        return stats.weighted_nll(weight), weight, ()

    return Objective(evaluate)
"""


def test_an_error_at_evaluation_is_seen_before_training_with_its_line(tmp_path):
    (tmp_path / "mine.py").write_text(OWN.replace("EXAMPLE", ""))
    objectives.register_from_file("mine.py")
    objective = objectives.get("mine", power=0.5)
    expected = rf"objective mine\(power=0.5\) cannot be evaluated: {tmp_path}/mine.py:8: NameError: name 'powr'"
    with pytest.raises(ValueError, match=expected) as caught:
        try_evaluate(objective)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", objectives.names())
def test_every_built_in_objective_can_be_tried(name):
    try_evaluate(objectives.example(name))


WORDS = ["--vocab-size", "64", "--tokens", "8", "--hidden", "16", "--backend", "reference", "--timeout", "60"]


@pytest.mark.parametrize("example", ["", ", example={'power': 0.5}"], ids=["without an example", "with one"])
def test_the_file_of_an_objective_with_a_required_parameter_can_be_verified(tmp_path, capsys, monkeypatch, example):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # Only a few of the others: the test is about which.
    for name in objectives.names():
        if name not in ("sft", "dft"):
            del registry_module._REGISTRY[name]
    text = OWN.replace("EXAMPLE", example).replace("powr", "power")
    (tmp_path / "mine.py").write_text(text + "\n\nobjectives.register('plain')(lambda: objectives.sft())\n")
    checked = []

    def verify(options, chosen, on_row):
        checked.extend(str(objective) for objective in chosen)
        return type("Verdict", (), dict(rows=(), failure="", ok=True, verified="this"))

    monkeypatch.setattr("qtarget_megatron.megatron.verify.layout.verify", verify)
    assert verify_parallel.main(["--objective-file", "mine.py", *WORDS]) == 0
    printed = capsys.readouterr().out
    said = "not verified: mine, with a parameter that has no default: name it, --objective mine:KEY=VALUE, or register"
    if example:
        assert checked == ["dft()", "mine(power=0.5)", "plain()", "sft()"] and said not in printed
    else:
        assert checked == ["dft()", "plain()", "sft()"] and said in printed
    checked.clear()
    assert verify_parallel.main(["--objective", "mine:power=2", "sft", *WORDS]) == 0
    assert checked == ["mine(power=2)", "sft()"] and "not verified" not in capsys.readouterr().out


def test_an_example_is_of_parameters_that_there_are():
    @objectives.register("with-defaults", example={"c": 2.0})
    def with_defaults(c: float = 1.0) -> Objective:
        return objectives.sft()

    assert str(objectives.example("with-defaults")) == "with-defaults(c=2.0)"
    assert objectives.example("unknown") is None
