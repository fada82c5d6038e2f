"""Records of Parquet and Arrow files, through the library datasets.

Only its builders for local files of these two kinds are called, on one file that is there: no name is looked up, no
pattern resolved, nothing downloaded and no code of a data set run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from qtarget_megatron.cache_folder import VARIABLE, cache_folder, cannot_write
from qtarget_megatron.data.forms import AUTO, form_of, record_at
from qtarget_megatron.data.jsonl import binary_kind
from qtarget_megatron.data.source_file import SourceFile

_log = logging.getLogger("qtarget_megatron")
# Rows that are converted, and lie in the copy, at once: of long conversations a few MB.
_ROWS = 1000
# Records whose text is measured for num_bytes.
_SAMPLE = 100
# What jsonl.binary_kind calls these files.
KINDS = ("parquet", "arrow", "an arrow stream")
# Arrow's types whose values are JSON's, and those of which some are: not NaN and the infinities.
_PLAIN = {"null", "bool", "string", "large_string", "string_view"}
_PLAIN |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_FLOATS = {"halffloat", "float", "double"}


@dataclass(frozen=True)
class _Number:
    """How a float of a column becomes JSON."""

    column: str

    def read(self, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(f'column "{self.column}": expected a finite number, got {value}, which JSON does not have')
        return float(value)


@dataclass(frozen=True)
class _JsonText:
    """How the JSON text of a column becomes JSON."""

    column: str

    def read(self, value: str) -> Any:
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f'column "{self.column}": expected JSON text, got {error.msg} at column {error.colno}'
            ) from error


# How a value becomes JSON: as it is, by itself, an object by its fields, or a list by what all its entries are.
_Reading = None | _Number | _JsonText | dict[str, Any] | list[Any]


class TableFile:
    """Random access to the rows of a Parquet or Arrow file as records.

    A row is an object of its columns. Arrow has all fields in all objects and cannot tell null from missing: fields of
    objects that are null are dropped, at any depth; entries of lists that are null stay. Columns of Arrow's type for
    JSON text are read as that JSON.

    What is read is a copy in Arrow's format, mapped into memory, that the library makes once for these contents; with
    ``mapped`` the file itself, as Dataset.save_to_disk wrote it. Nothing is kept for each record. Forked and spawned
    workers may read it. Records count from 0, in messages too.

    Raises ValueError, when it is opened, without the library, for a file that is damaged, has a column of values that
    JSON does not have, or whose first record has no known form; and when a record is read, once the file is gone or
    has other contents. A file may be empty.
    """

    def __init__(self, path: str | os.PathLike[str], form: str = AUTO, *, mapped: bool = False):
        self.path, self.form = str(path), form
        self._source = SourceFile(path)
        with open(self.path, "rb") as file:
            kind, advice = binary_kind(file.read(16)) or ("text or something else", "")
        if kind not in (KINDS[-1:] if mapped else KINDS):
            expected = "an arrow stream, as save_to_disk writes it" if mapped else "parquet or arrow"
            raise ValueError(f"data file {self.path!r}: expected {expected}, got {kind}")
        library = _library(self.path, kind, advice)
        cache = str(cache_folder("datasets")) if os.environ.get(VARIABLE) else None
        with _quiet(library):
            self._rows = _opened(os.path.abspath(self.path), self.path, kind, self._source.digest, cache, mapped)
        self._columns = {} if self._rows is None else _readings(self._rows.features.arrow_schema, self.path)
        if len(self):
            self.record(0)
            self.form = form_of(self.raw(0)) if form == AUTO else form

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of all records as JSON lines, from those of a hundred of them."""
        if not len(self):
            return 0
        sample = np.linspace(0, len(self) - 1, min(len(self), _SAMPLE), dtype=np.int64).tolist()
        return sum(len(self.text(index).encode()) + 1 for index in sample) * len(self) // len(sample)

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return self._source.digest

    def where(self, index: int) -> str:
        """``path, record index``, for messages."""
        return f"{self.path}, record {index}"

    def record(self, index: int) -> dict[str, Any]:
        """The record at ``index`` as forms.canonical gives it; ValueError with its number where it has another form."""
        return record_at(self, index, file=self.path)

    def text(self, index: int) -> str:
        """The record at ``index`` as JSON in one line."""
        text = json.dumps(self.raw(index), ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            came = json.dumps(text[error.start])
            raise ValueError(
                f"{self.where(index)}: expected Unicode text, got {came}, half of a surrogate pair"
            ) from None
        return text

    def raw(self, index: int) -> dict[str, Any]:
        """The record at ``index`` with the fields that it has, of any form."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        self._source.check()
        try:
            (row,) = self._rows[int(index)].to_pylist()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where(index)}: expected UTF-8, got {error.reason}") from error
        try:
            return _as_json(row, self._columns)  # type: ignore[no-any-return]  # of an object it is one
        except RecursionError as error:
            raise ValueError(f"{self.where(index)}: expected a record, got JSON nested too deep to read") from error
        except ValueError as error:
            raise ValueError(f"{self.where(index)}: {error}") from error


def _as_json(value: Any, reading: _Reading) -> Any:
    if value is None or reading is None:
        return value
    if isinstance(reading, dict):
        fields = ((name, _as_json(value[name], reading[name])) for name in reading)
        return {name: found for name, found in fields if found is not None}
    if isinstance(reading, list):
        return [_as_json(entry, reading[0]) for entry in value]
    return reading.read(value)


def _readings(fields: Any, path: str, inside: str = "") -> dict[str, _Reading]:
    """How the columns of an Arrow schema, or the fields of one of its structs, are read; ValueError for one that cannot
    be. inside: what comes before their names."""
    readings: dict[str, _Reading] = {}
    for field in fields:
        if field.name in readings:
            raise ValueError(f'data file {path!r} has two columns "{inside}{field.name}": rename one')
        readings[field.name] = _reading(field.type, path, inside + field.name)
    return readings


def _reading(kind: Any, path: str, column: str) -> _Reading:
    import pyarrow

    types, name = pyarrow.types, str(kind)
    if isinstance(kind, pyarrow.BaseExtensionType):
        if kind.extension_name == "arrow.json":
            return _JsonText(column)
    elif name in _PLAIN:
        return None
    elif name in _FLOATS:
        return _Number(column)
    elif types.is_dictionary(kind):
        return _reading(kind.value_type, path, column)
    elif types.is_struct(kind):
        return _readings(kind, path, f"{column}.")
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        entries = _reading(kind.value_type, path, column)
        return None if entries is None else [entries]
    raise ValueError(
        f'data file {path!r}, column "{column}": expected text, numbers, true and false, lists or objects, got '
        f"{name[:60]}, which JSON does not have: leave the column out, or write it as text"
    )


def _library(path: str, kind: str, advice: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data file {path!r} is {kind}, which the library datasets reads ({error}): pip install "
            f"'qtarget_megatron[data]' (or {advice.replace('FILE', path)})"
        ) from error
    library: ModuleType = datasets
    return library


@contextlib.contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """Within it the library logs nothing, and shows progress on a terminal only, that of the first rank."""
    logs, variable = library.utils.logging, "HF_DATASETS_DISABLE_PROGRESS_BARS"
    level, watched = logs.get_verbosity(), int(os.environ.get("RANK", "0")) == 0 and sys.stderr.isatty()
    hidden = not (watched or library.are_progress_bars_disabled() or variable in os.environ)
    logs.set_verbosity(logs.CRITICAL + 1)
    if hidden:
        library.disable_progress_bars()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if hidden:
            library.enable_progress_bars()


@functools.lru_cache(maxsize=1024)
def _opened(file: str, path: str, kind: str, digest: str, cache: str | None, mapped: bool) -> Any:
    """A Dataset whose rows are Arrow tables; None for a file without rows. Once in a process.

    path:   the file as the user named it.
    digest: that of its contents.
    cache:  the folder of the copies; None for the library's own.
    """
    import datasets

    with _one_line(path):
        schema = _schema(file, kind)
    _readings(schema, path)
    if "::" in file and not mapped:
        raise ValueError(f"data file {path!r}: expected a path without '::', which datasets takes apart: rename it")
    with _one_line(path, None if mapped else cache or str(datasets.config.HF_DATASETS_CACHE)):
        rows = datasets.Dataset.from_file(file) if mapped else _copied(file, path, kind, digest, cache)
        return rows.with_format("arrow") if rows is not None and len(rows) else None


def _schema(file: str, kind: str) -> Any:
    """The columns of a file. That of an Arrow file is sound: as it is mapped, it might point anywhere."""
    import pyarrow
    import pyarrow.parquet

    if kind == "parquet":
        return pyarrow.parquet.read_schema(file)
    with pyarrow.memory_map(file) as source:
        if kind == "arrow":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            reader = batches = pyarrow.ipc.open_stream(source)
        for batch in batches:
            batch.validate(full=True)
        return reader.schema


def _copied(file: str, path: str, kind: str, digest: str, cache: str | None) -> Any:
    """The Dataset of the library's copy of a file, which the first of many processes makes; None without rows."""
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.parquet.parquet import Parquet

    options: dict[str, Any] = {
        "cache_dir": cache,
        # Not the time of the file: other contents are another copy.
        "hash": f"{digest[:32]}-{datasets.__version__}",
        "data_files": DataFilesDict({"train": DataFilesList([file], [()])}),
    }
    builder = Parquet(batch_size=_ROWS, **options) if kind == "parquet" else Arrow(**options)
    if not os.path.exists(builder.cache_dir):
        _log.info("%s: an Arrow copy goes to %s", path, builder.cache_dir)
    builder.download_and_prepare()
    return builder.as_dataset("train") if builder.info.splits["train"].num_examples else None


@contextlib.contextmanager
def _one_line(path: str, copies: str | None = None) -> Iterator[None]:
    """Within it whatever the library makes of a damaged file is a ValueError, and of a disk, where it makes a copy in a
    folder."""
    try:
        yield
    except Exception as error:  # there is no end of kinds
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        # An error of the system has a number, one of the contents has none.
        found = next((e for e in chain if isinstance(e, OSError) and e.errno is not None), None)
        if isinstance(found, FileNotFoundError) and copies is not None:
            raise ValueError(
                f"data file {path!r}: its Arrow copy lacks a file: delete the rest of that folder: {found}"
            ) from error
        if found is not None and copies is not None:
            raise cannot_write(f"data file {path!r}, as an Arrow copy,", copies, found) from error
        why = next((e for e in chain if type(e).__name__ != "DatasetGenerationError"), error)
        text = " ".join(str(why).split())[:300]
        raise ValueError(f"data file {path!r} cannot be read by datasets: {type(why).__name__}: {text}") from error
