"""Families of checkpoints are declarations: one small file each, found by itself."""

import importlib
import json
import sys

import pytest

from qtarget_megatron.huggingface import Architecture, hf_tensor_shapes
from qtarget_megatron.huggingface.config import families
from qtarget_megatron.huggingface.config.family import Family

DECLARED = families.all_families()
PLANET = """
from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(name="planet", architecture="PlanetForCausalLM", qkv_bias=True, tensors={"head": "planet.head"})
"""
CONFIG = dict(vocab_size=7, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture
def another(tmp_path, monkeypatch):
    """Adds a file to the folder of families."""

    def add(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
        families.all_families.cache_clear()
        importlib.invalidate_caches()

    before = set(sys.modules)
    yield add
    families.all_families.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith(f"{families.__name__}."):
            del sys.modules[name]


def write(folder, **config):
    (folder / "config.json").write_text(json.dumps(CONFIG | dict(max_position_embeddings=16) | config))
    return folder


def test_a_new_family_is_one_file(tmp_path, another):
    directory = write(tmp_path, architectures=["PlanetForCausalLM"])
    with pytest.raises(ValueError, match="got \\['PlanetForCausalLM'\\]"):
        Architecture.from_hf(directory)
    another("planet", PLANET)
    arch = Architecture.from_hf(directory)
    assert arch.family == "planet" and arch.qkv_bias
    shapes = hf_tensor_shapes(arch)
    assert shapes["planet.head.weight"] == (7, 8)
    assert shapes["model.layers.0.self_attn.q_proj.bias"] == (8,)


def test_an_architecture_has_one_family(another):
    another("planet", PLANET.replace("PlanetForCausalLM", DECLARED[0].architecture))
    with pytest.raises(ValueError, match=f"each architecture in one file.*{DECLARED[0].architecture}"):
        families.all_families()


def test_a_name_of_no_tensor_is_a_mistake():
    with pytest.raises(ValueError, match="family planet: expected roles of .*'attention_output'.*, got \\['haed'\\]"):
        Family(name="planet", architecture="Planet", tensors={"haed": "planet.head"})


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    known = [family.architecture for family in DECLARED if family.refused is None]
    with pytest.raises(ValueError, match=f"hold one of {', '.join(known)}, got \\['FalconForCausalLM'\\]"):
        Architecture.from_hf(write(tmp_path, architectures=["FalconForCausalLM"]))


@pytest.mark.parametrize("family", [family for family in DECLARED if family.refused is not None])
def test_a_family_that_is_not_supported_is_refused_with_the_reason(tmp_path, family):
    with pytest.raises(ValueError, match="expected a family that is supported") as error:
        Architecture.from_hf(write(tmp_path, architectures=[family.architecture]))
    assert str(error.value).endswith(f"got {family.name}: {family.refused}") and "\n" not in str(error.value)
