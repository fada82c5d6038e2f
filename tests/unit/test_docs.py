"""README.md and docs/: links lead somewhere, Python in them runs, every objective is described, the site builds."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from doc_pages import anchors, blocks, links, pages
from launching import REPOSITORY

from qtarget_megatron import objectives
from qtarget_megatron.objectives import registry as registry_module

PAGES = pages()
TEXTS = [*PAGES, *(REPOSITORY / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        if not re.match(r"https?://", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            # A file: the site has no page for a folder.
            assert target.is_file() and target.is_relative_to(REPOSITORY), link
            assert not anchor or anchor in anchors(target), link


def test_the_places_of_contributing_exist():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    places = re.findall(r"`((?:qtarget_megatron|csrc|docs|examples|tools|tests|benchmarks)/[^`]*)`", text)
    assert len(places) > 30
    for place in places:
        assert list(REPOSITORY.glob(place.rstrip("/"))), place


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading, [here](b.md#c)\n\n`[no](link)` ![and](d.png)\n\n```python\nx[0](y)\n# comment\n```\n")
    assert links(page) == ["b.md#c", "d.png"]
    assert anchors(page) == {"a-heading-herebmdc"}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: f"{page.parent.name}/{page.name}"
)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page one after another, in one namespace."""
    monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))
    monkeypatch.setattr(registry_module, "_EXAMPLES", dict(registry_module._EXAMPLES))
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for block in blocks(page, "python"):
        if block.skipped is None:
            exec(compile(block.text, str(page), "exec"), namespace)


def test_what_is_not_run_says_why():
    for page in PAGES:
        for block in (*blocks(page, "python"), *blocks(page, "sh")):
            assert block.skipped is None or len(block.skipped.split()) >= 3, (page, block)
        # A mark that stands in front of no block skips nothing.
        marked = [block for language in ("python", "sh") for block in blocks(page, language) if block.skipped]
        assert page.read_text().count("<!-- not run:") == len(marked), page


# ---- the objectives


def test_every_objective_has_a_section_and_a_place_in_the_readme():
    sections = re.findall(r"^### (\S+)\n\n(Use it .+)", (REPOSITORY / "docs/objectives.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in sections) == objectives.names()
    rows = re.findall(r"^\| \[.*\]\(docs/objectives\.md#.*\) \| (.*) \|$", (REPOSITORY / "README.md").read_text(), re.M)
    assert sorted(re.findall(r"`([a-z0-9-]+)`", " ".join(rows))) == objectives.names()


def test_help_tells_every_objective_and_its_formula():
    text = objectives.describe()
    for name in objectives.names():
        assert re.search(rf"^{name} .*\n    \S.*\n\n    loss = ", text, re.MULTILINE), name
    assert "target-sft eta=0.5" in text and "beyond-log alpha=...\n" in text


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; a warning, as of a dead link, fails the build."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def test_docstrings_become_markdown(monkeypatch):
    if importlib.util.find_spec("griffe") is None:
        pytest.skip("griffe is not installed: pip install '.[docs]'")
    monkeypatch.syspath_prepend(REPOSITORY / "tools/docs")
    from field_lists import markdown

    text = "Sum of a*z and `b*t`.\n\nids:  of tokens\nlog_p: theirs,\n       in nats\n"
    text += "The same everywhere::\n\n    x = y * z\n"
    assert markdown(text) == (
        "Sum of a\\*z and `b*t`.\n\n- `ids`: of tokens\n- `log_p`: theirs,\n    in nats\n\nThe same everywhere:\n\n"
        "    x = y * z"
    )
    # griffe reads these itself.
    assert markdown("Args:\n    a: one.\n") == "Args:\n    a: one."


@pytest.mark.slow
def test_the_site_describes_every_objective(site):
    page = (site / "objectives/index.html").read_text()
    for name in objectives.names():
        section = page[page.index(f'<h3 id="{name}">') :].split("<h3")[1]
        assert all(f"<li>{word}" in section for word in ("loss: ", "masses: ", "gradient: ", "reads "))
        assert f"../pictures/{name}.svg" in section and 'class="quote"' in section
        for key in objectives.get(name, **example(name)).parameters:
            assert f"<td><code>{key[0]}</code></td>" in section, (name, key)
        assert (site / f"pictures/{name}.svg").read_text().count("<path") > 10


def example(name):
    return dict(objectives.example(name).parameters)


@pytest.mark.slow
def test_the_site_has_readme_reference_and_what_pages_link_to(site):
    assert "one all-gather" in re.sub("<.*?>", "", (site / "index.html").read_text())
    reference = (site / "api/index.html").read_text()
    for name in ("qtarget_cross_entropy", "SparseTeacher", "Objective", "inspection.induced_target"):
        assert f'id="qtarget_megatron.{name}"' in reference, name
    for path in ("examples/launch/slurm.sh", "benchmarks/REPORT/index.html", "examples/targets/targets.png"):
        assert (site / path).is_file(), path
