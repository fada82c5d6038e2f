"""What the README says about the objectives is so."""

import inspect
import re

from launching import REPOSITORY

from qtarget_megatron import objectives

README = (REPOSITORY / "README.md").read_text()
ROW = re.compile(r"^\| \[`([a-z0-9-]+)`\]\((\S+)#L(\d+)\)(?: `([^`]*)`)? \|(.*)\|$", re.MULTILINE)


def test_every_objective_has_a_row_that_links_to_its_function():
    rows = {name: (path, int(line)) for name, path, line, *_ in ROW.findall(README)}
    assert set(rows) == set(objectives.names())
    for name, (path, line) in rows.items():
        linked = (REPOSITORY / path).read_text().splitlines()[line - 1]
        assert linked.startswith(f"def {name.replace('-', '_')}("), f"{path}#L{line}: {linked}"


def test_help_tells_every_objective_and_its_formula():
    text = objectives.describe()
    for name in objectives.names():
        assert re.search(rf"^{name} .*\n    \S.*\n\n    loss = ", text, re.MULTILINE), name
    assert "target-sft eta=0.5" in text and "beyond-log alpha=...\n" in text


def test_the_table_states_the_defaults_and_the_side_inputs():
    for name, _, _, parameters, cells in ROW.findall(README):
        signature = inspect.signature(getattr(objectives, name.replace("-", "_")))
        stated = dict(pair.split("=") for pair in parameters.split())
        for key, text in stated.items():
            default = signature.parameters[key].default
            expected = "..." if default is inspect.Parameter.empty else str(default).removesuffix(".0")
            assert text == expected, (name, key)
        required = {k for k, p in signature.parameters.items() if p.default is inspect.Parameter.empty}
        assert required <= set(stated), name
        objective = objectives.get(name, **dict.fromkeys(required, 1))
        reads = cells.split(" | ")[3].strip()
        assert set(re.findall(r"`(\w+)`", reads)) == set(objective.token_inputs), name
        assert objective.needs_teacher == (reads in ("teacher", "reference", "base model")), name
