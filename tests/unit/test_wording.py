"""Docstrings and comments that a newcomer reads once."""

import ast
import io
import re
import tokenize

from launching import REPOSITORY

FOLDERS = ("qtarget_megatron", "tools", "examples")


def sources():
    files = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return {path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in files}


def docstrings(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (found := ast.get_docstring(node)):
            yield getattr(node, "name", "module"), found


def test_a_docstring_begins_with_a_noun_or_a_verb():
    """One that begins with "Of" leaves out what it speaks of."""
    found = [f"{name}: {of}" for name, text in sources().items() for of, doc in docstrings(text) if doc[:3] == "Of "]
    assert found == []


def test_a_comment_says_what_it_speaks_of():
    found = []
    for name, text in sources().items():
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and token.string.startswith("# Of "):
                found.append(f"{name}:{token.start[0]}")
    assert found == []


def test_a_docstring_names_its_fields_a_line_each():
    """Two of them in running prose no tool can render, and no eye finds."""
    running = re.compile(r"\. [a-z_0-9]+(?:, [a-z_0-9]+)*: ")
    package = {name: text for name, text in sources().items() if name.startswith("qtarget_megatron/")}
    assert [
        f"{name}: {of}"
        for name, text in package.items()
        for of, doc in docstrings(text)
        if len(running.findall(doc)) > 1
    ] == []


def test_every_public_module_function_and_class_of_the_losses_has_a_docstring():
    for name, text in sources().items():
        if not name.startswith(("qtarget_megatron/loss/", "qtarget_megatron/objectives/", "qtarget_megatron/kernels/")):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list):
                    continue  # the implementation has it
                assert ast.get_docstring(node), f"{name}:{node.lineno}: {node.name}"
