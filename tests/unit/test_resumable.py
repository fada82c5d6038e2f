"""A file that a long run appends to: what is kept, what is refused, and when it appears."""

import errno
import json
import os

import pytest

from qtarget_megatron import output_lock
from qtarget_megatron.resumable import ResumableLines, directory_digest, file_digest

MADE_FROM = {"--data": "abc", "--seq-length": 8, "precision": ["--bf16"]}


@pytest.fixture(autouse=True)
def nothing_is_held():
    yield
    output_lock.release_all()


def begin(path, lines, made_from=MADE_FROM):
    """A run that ended after these lines."""
    unfinished = ResumableLines(path, made_from)
    unfinished.check(overwrite=False, inputs=[])
    assert unfinished.open() == 0
    unfinished.append(lines)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_the_file_appears_under_its_name_only_when_complete(tmp_path):
    path = tmp_path / "out.jsonl"
    file = ResumableLines(path, MADE_FROM)
    file.check(overwrite=False, inputs=[])
    assert names(tmp_path) == []
    assert file.open() == 0
    file.append(["one", "zwei ü"])
    assert (tmp_path / "out.jsonl.partial").read_text(encoding="utf-8") == "one\nzwei ü\n"  # on disk before the end
    assert names(tmp_path) == [".out.jsonl.lock", "out.jsonl.partial", "out.jsonl.partial.json"]
    file.append([])
    file.append(["three"])
    file.finish()
    assert names(tmp_path) == ["out.jsonl"]
    assert path.read_text(encoding="utf-8") == "one\nzwei ü\nthree\n"


@pytest.mark.parametrize("torn", [b"", b"thr", b'{"messages": [', "ü".encode()[:1]])
def test_a_later_run_goes_on_behind_the_last_complete_line(tmp_path, torn):
    path = tmp_path / "out.jsonl"
    begin(path, ["one", "two"])
    with open(tmp_path / "out.jsonl.partial", "ab") as file:
        file.write(torn)
    again = ResumableLines(path, dict(reversed(MADE_FROM.items())))
    again.check(overwrite=False, inputs=[])
    assert again.open() == 2
    again.append(["three"])
    again.finish()
    assert path.read_text() == "one\ntwo\nthree\n"


def test_long_files_are_counted_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("qtarget_megatron.resumable._CHUNK", 7)
    begin(tmp_path / "o", ["a" * n for n in range(20)])
    with open(tmp_path / "o.partial", "ab") as file:
        file.write(b"b" * 30)
    assert ResumableLines(tmp_path / "o", MADE_FROM).open() == 20
    assert (tmp_path / "o.partial").read_text() == "".join("a" * n + "\n" for n in range(20))


@pytest.mark.parametrize(
    ("made_from", "named"),
    [
        (MADE_FROM | {"--data": "other"}, "a different --data:"),
        (MADE_FROM | {"--data": "other", "--seq-length": 9}, "a different --data, --seq-length:"),
        (MADE_FROM | {"--load": "x"}, "a different --load:"),
        ({"--data": "abc", "--seq-length": 8}, "a different precision:"),
    ],
)
def test_a_run_with_other_inputs_is_refused(tmp_path, made_from, named):
    begin(tmp_path / "o", ["one"])
    with pytest.raises(ValueError, match=named + " go on with the same, or delete it"):
        ResumableLines(tmp_path / "o", made_from).check(overwrite=True, inputs=[])
    assert (tmp_path / "o.partial").read_text() == "one\n"


@pytest.mark.parametrize("header", [None, "", "{", "3", "[1]"])
def test_lines_of_unknown_origin_are_refused(tmp_path, header):
    begin(tmp_path / "o", ["one"])
    (tmp_path / "o.partial.json").unlink()
    if header is not None:
        (tmp_path / "o.partial.json").write_text(header)
    with pytest.raises(ValueError, match=r"o\.partial\.json, which says .* delete both"):
        ResumableLines(tmp_path / "o", MADE_FROM).check(overwrite=False, inputs=[])


def test_a_header_without_lines_is_replaced(tmp_path):
    begin(tmp_path / "o", [])
    (tmp_path / "o.partial").unlink()
    begin(tmp_path / "o", ["one"], {"--data": "new"})
    assert json.loads((tmp_path / "o.partial.json").read_text()) == {"--data": "new"}


def test_an_existing_file_is_replaced_only_on_request_and_only_at_the_end(tmp_path):
    path = tmp_path / "o"
    path.write_text("precious")
    with pytest.raises(ValueError, match="exists already: give --overwrite"):
        ResumableLines(path, MADE_FROM).check(overwrite=False, inputs=[])
    file = ResumableLines(path, MADE_FROM)
    file.check(overwrite=True, inputs=[])
    file.open()
    file.append(["new"])
    assert path.read_text() == "precious"
    file.finish()
    assert path.read_text() == "new\n"


@pytest.mark.parametrize("source", ["o", "o.partial", "o.partial.json", "link", "hard"])
def test_the_input_is_never_written_to(tmp_path, source):
    (tmp_path / source if source not in ("link", "hard") else tmp_path / "o").write_text("data")
    if source == "link":
        (tmp_path / "link").symlink_to(tmp_path / "o")
    if source == "hard":
        os.link(tmp_path / "o", tmp_path / "hard")
    with pytest.raises(ValueError, match="is the input, which would be lost"):
        ResumableLines(tmp_path / "o", MADE_FROM).check(overwrite=True, inputs=[tmp_path / source])


def test_places_that_cannot_hold_a_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no directory"):
        ResumableLines(tmp_path / "none" / "o", MADE_FROM).check(overwrite=False, inputs=[])
    with pytest.raises(ValueError, match="is a directory"):
        ResumableLines(tmp_path, MADE_FROM).check(overwrite=True, inputs=[])


def test_a_full_disk_is_one_line_that_says_how_to_go_on(tmp_path, monkeypatch):
    file = ResumableLines(tmp_path / "o", MADE_FROM)
    file.open()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(full))
    with pytest.raises(ValueError, match=r"o\.partial: No space left on device; run again to go on"):
        file.append(["one"])


def test_digests_follow_contents_and_changes(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.safetensors").write_text("12")
    (tmp_path / "d").write_text("12")
    assert file_digest(tmp_path / "d") == "6b51d431df5d7f141cbececcf79edf3dd861c3b4069f0b11661a3eefacbba918"
    before = directory_digest(model)
    assert directory_digest(model) == before
    (model / "a.safetensors").write_text("1")
    shorter = directory_digest(model)
    (model / "b").write_text("")
    assert len({before, shorter, directory_digest(model)}) == 3
    os.utime(model / "a.safetensors", ns=(1, 1))
    assert directory_digest(model) not in (before, shorter)
