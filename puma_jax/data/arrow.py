"""Tables that are read through Arrow: parquet files, and datasets of Hugging Face."""

from __future__ import annotations

import datetime
import decimal
import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from puma_jax.data.lines import reading
from puma_jax.errors import ConfigError, DataError, one_line
from puma_jax.files import sha256
from puma_jax.schema import shown

_CACHED_BYTES = 2**30
"""Row groups of a parquet file that memory keeps; at least one is kept whatever its size."""


class ParquetTable:
    """A parquet file, of which the row groups read last are held in memory."""

    def __init__(self, path: Path, wanted: Collection[str]):
        """Open a file.

        Args:
            path: The file.
            wanted: Columns that may hold images.
        """
        with needs("pyarrow"):
            import pyarrow.parquet
        self.path = path
        with reading(path):
            self.fingerprint = sha256(path)
        with _failing(path):
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
            schema = self._file.schema_arrow
        self.names, self.left_out = _columns(schema, wanted)
        metadata = self._file.metadata
        counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._ends = np.cumsum([0, *counts])[1:]
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, number: int) -> dict[str, Any]:
        """Return the values of a row by column."""
        group = int(np.searchsorted(self._ends, number, side="right"))
        table = self._group(group)
        place = number - (int(self._ends[group]) - table.num_rows)
        with _failing(self.path):
            return {name: _plain(table.column(name)[place].as_py()) for name in self.names}

    def place(self, number: int) -> str:
        """Return the file and the number of a row, from 1."""
        return f"{self.path}, row {number + 1}"

    def _group(self, number: int) -> Any:
        with self._lock:
            if number not in self._cache:
                with _failing(self.path):
                    self._cache[number] = self._file.read_row_group(number, self.names)
            self._cache.move_to_end(number)
            while len(self._cache) > 1 and self._cached_bytes() > _CACHED_BYTES:
                self._cache.popitem(last=False)
            return self._cache[number]

    def _cached_bytes(self) -> int:
        return sum(table.nbytes for table in self._cache.values())


class DatasetTable:
    """A dataset of Hugging Face, in a folder or on the hub."""

    def __init__(self, source: str, wanted: Collection[str]):
        """Open a dataset.

        Args:
            source: Folder that `Dataset.save_to_disk` wrote, or a name on the hub; a split may
                stand behind a colon.
            wanted: Columns that may hold images.
        """
        with needs("datasets"):
            import datasets
        name, _, split = source.partition(":")
        self.path = Path(name)
        with _failing(name):
            if self.path.is_dir() and not split:
                found = datasets.load_from_disk(name)
            elif self.path.is_dir():
                found = datasets.load_from_disk(str(self.path / split))
            else:
                found = datasets.load_dataset(name, split=split or None)
        if not isinstance(found, datasets.Dataset):
            raise DataError(
                f"{name} has the splits {', '.join(found)}: name one of them behind it, as in "
                f"{'' if self.path.is_dir() else 'hf:'}{name}{'/' if self.path.is_dir() else ':'}"
                f"{next(iter(found))}"
            )
        for column, feature in found.features.items():
            if hasattr(feature, "decode"):  # images and sound: as they are stored
                found = found.cast_column(column, type(feature)(decode=False))
        self.names, self.left_out = _columns(found.features.arrow_schema, wanted)
        self._rows = found.select_columns(self.names)
        self.fingerprint = found._fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> dict[str, Any]:
        """Return the values of a row by column."""
        with _failing(self.path):
            return {name: _plain(value) for name, value in self._rows[number].items()}

    def place(self, number: int) -> str:
        """Return the dataset and the number of a row, from 1."""
        return f"{self.path}, row {number + 1}"


@contextmanager
def needs(package: str, extra: str = "tables") -> Iterator[None]:
    """Say in one line what to install if a package cannot be imported.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{package} cannot be imported ({error}): run pip install -e '.[{extra}]' in the clone "
            "of puma_jax"
        ) from None


def _columns(schema: Any, wanted: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the names of the columns of a schema to read, and those left out with their types."""
    if len({*schema.names}) < len(schema.names):
        raise DataError(f"columns {', '.join(map(shown, schema.names))}: a name is given twice")
    read = [one.name for one in schema if one.name in wanted or _is_plain(one.type)]
    return read, [f"{one.name} ({one.type})" for one in schema if one.name not in read]


def _is_plain(kind: Any) -> bool:
    """Whether a type of Arrow is one that a further field can hold."""
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type) and not types.is_nested(kind.value_type)
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    dates = types.is_date(kind) or types.is_timestamp(kind) or types.is_time(kind)
    return texts or numbers or dates or types.is_boolean(kind) or types.is_null(kind)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: dates in ISO's form, NaN as missing."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return None if isinstance(value, float) and math.isnan(value) else value


@contextmanager
def _failing(source: str | Path) -> Iterator[None]:
    """Turn whatever a library raises for a file into one line.

    Raises:
        DataError: The file or dataset cannot be read.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise a great many classes
        raise DataError(f"{source} cannot be read: {one_line(str(error))[:300]}") from error
