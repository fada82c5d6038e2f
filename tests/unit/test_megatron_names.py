"""tools/megatron_names.py finds what a Megatron does not have, and nothing else."""

import pytest

from tools.megatron_names import Sources, Use, installed, main, uses

TREE = {
    "core/__init__.py": "from .a import made\nfrom megatron.core.star import *\nimport torch\n",
    "core/a.py": """
try:
    import fast
    def made(x, *, y=1): ...
except ImportError:
    made = None

class Base:
    def __init__(self, config, **kwargs): ...
    def forward(self, hidden): ...
    kept = 1

class Derived(Base):
    def step(self):
        self.set = 2

""",
    "core/star.py": """
def given(*, name): ...

class Fields:
    a: int
    b: int = 2

class More(Fields):
    c: int = 3
""",
    "core/open.py": "from torch.nn import Module\nclass Open(Module):\n    def own(self, x): ...\n",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for name, text in TREE.items():
        path = root / "megatron" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Sources(root)


@pytest.mark.parametrize(
    ("use", "problem"),
    [
        (("megatron.core", "made", None, ("x", "y")), None),
        (("megatron.core", "given", None, ("name",)), None),
        (("megatron.core", "a"), None),
        (("megatron.core", "a", "made", ("y",)), None),
        (("megatron.core.a", "Base", None, ("anything",)), None),
        (("megatron.core.a", "Derived", "forward", ("hidden",)), None),
        (("megatron.core.a", "Derived", "set"), None),
        (("megatron.core", "More", None, ("a", "c")), None),
        (("megatron.core.open", "Open", "inherited", ("x",)), None),
        (("megatron.core", "gone"), "megatron.core has no gone"),
        (("megatron.none", "made"), "megatron.none has no made"),
        (("megatron.core", "made", None, ("y", "z")), "megatron.core.made takes no z"),
        (("megatron.core", "a", "gone"), "megatron.core.a has no gone"),
        (("megatron.core.a", "Derived", "gone"), "megatron.core.a.Derived has no gone"),
        (("megatron.core.a", "Derived", "forward", ("labels",)), "megatron.core.a.Derived.forward takes no labels"),
        (("megatron.core", "More", None, ("d",)), "megatron.core.More takes no d"),
        (("megatron.core.open", "Open", "own", ("y",)), "megatron.core.open.Open.own takes no y"),
    ],
)
def test_what_is_not_there_is_named(sources, use, problem):
    assert sources.problem(Use("file.py:1", *use)) == problem


def test_the_installed_megatron_has_all_that_is_used(capsys):
    assert main([]) == 0, capsys.readouterr().out
    found = uses()
    # Names of functions, of modules' members and of base classes; calls with keywords.
    assert len({str(use) for use in found}) > 80 and sum(bool(use.keywords) for use in found) > 20
    assert any(use.member == "forward" for use in found) and installed().is_dir()


def test_a_folder_without_megatron_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "megatron/core" in capsys.readouterr().err
