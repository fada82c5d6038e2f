"""What the words of --sft-train and --sft-valid name."""

import pytest

from qtarget_megatron.data import HeldOutSet, Source, held_out_sets, training_sources


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "odd:2", "x=y.jsonl"):
        (tmp_path / name).touch()
    return tmp_path


def words(sources):
    return [(str(source.path), source.weight) for source in sources]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a.jsonl"], [("a.jsonl", None)]),
        (["a.jsonl", "b.jsonl"], [("a.jsonl", None), ("b.jsonl", None)]),
        (["a.jsonl:0.7", "b.jsonl:3e-1"], [("a.jsonl", 0.7), ("b.jsonl", 0.3)]),
        (["odd:2"], [("odd:2", None)]),  # a file of that name
        (["odd:2:5"], [("odd:2", 5.0)]),
        (["gone.jsonl"], [("gone.jsonl", None)]),  # its reader says that it is not there
        (["gone.jsonl:2"], [("gone.jsonl", 2.0)]),
        (["s3:name"], [("s3:name", None)]),
    ],
)
def test_sources_and_their_weights(folder, given, expected):
    assert words(training_sources(given)) == expected
    assert all(isinstance(source, Source) for source in training_sources(given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a.jsonl:0"], "--sft-train a.jsonl:0: expected a weight above 0, got 0"),
        (["a.jsonl:-1", "b.jsonl:1"], "expected a weight above 0, got -1"),
        (["a.jsonl:nan"], "expected a weight above 0, got nan"),
        (["a.jsonl:inf"], "expected a weight above 0, got inf"),
        (["a.jsonl:much"], "expected a number behind the colon, a weight, got 'much'"),
        (["a.jsonl:1", "b.jsonl"], "--sft-train b.jsonl: the others have a weight, this has none"),
        (["a.jsonl", "a.jsonl"], "--sft-train has a.jsonl 2 times: give it once, with a weight"),
    ],
)
def test_weights_that_are_none_are_refused(folder, given, message):
    with pytest.raises(ValueError) as caught:
        training_sources(given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_held_out_sets_have_names(folder):
    found = held_out_sets(["a.jsonl", "maths=b.jsonl", "x=y.jsonl"])
    assert [(str(one.path), one.name) for one in found] == [
        ("a.jsonl", "a"),
        ("b.jsonl", "maths"),
        ("x=y.jsonl", "x=y"),
    ]
    assert isinstance(found[0], HeldOutSet)
    with pytest.raises(ValueError, match="--sft-valid has a 2 times: give names, as"):
        held_out_sets(["a.jsonl", "other/a.jsonl"])
