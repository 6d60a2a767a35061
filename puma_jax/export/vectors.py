"""Vectors for other stores and tools: parquet, NumPy, the files of big-ann-benchmarks, Lance.

```
parquet   vectors-00000.parquet ...   id, vector (fixed_size_list<float32, width>), text, image,
                                      modality, and a column for each further field
lance     vectors.lance               the same columns
npy       vectors-00000.npy ...       float32 [n, width]; ids and items stand beside them
fbin      vectors.fbin                uint32 n, uint32 width, then float32 rows
u8bin     vectors.u8bin               uint32 n, uint32 width, then uint8 rows
ids.txt, items.jsonl                  for npy, fbin and u8bin: ids and items, in the same order
manifest.json                         what the files hold, with their lengths and SHA-256
```

A value v is stored in u8bin as `round(127 v / s) + 128`, where s, which the manifest states, is the
largest magnitude of all values. Distances keep their order, inner products of such rows do not.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from puma_jax.artifacts import atomic_folder, write_json
from puma_jax.data.arrow import needs
from puma_jax.errors import ConfigError
from puma_jax.files import sha256
from puma_jax.progress import Progress
from puma_jax.search.exact import document_of
from puma_jax.search.index import Document
from puma_jax.search.quantize import to_int8
from puma_jax.search.shards import Vectors
from puma_jax.typing import Float, ndarray

Format = Literal["parquet", "lance", "npy", "fbin", "u8bin"]

_COLUMNS = ("id", "vector", "text", "image", "modality")
_ROWS_AT_ONCE = 4096
_HEADER = np.dtype("<u4")

Batches = Iterator[tuple[Float[ndarray, "n width"], list[Document]]]


def write_vectors(
    vectors: Vectors,
    out: Path,
    kind: Format,
    *,
    rows_per_file: int = 250_000,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a folder that other tools read, which appears whole, and return its manifest.

    Memory holds a few thousand vectors at a time.

    Args:
        vectors: The vectors and their items.
        out: Folder to write: missing, or empty.
        kind: Format of the files.
        rows_per_file: Vectors in a file of parquet or npy, and in a fragment of Lance.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: `rows_per_file` is below 1, or a package is not installed.
        ArtifactError: The folder is not empty, or cannot be written.
        VectorsError: A file of the vectors is damaged.
    """
    if rows_per_file < 1:
        raise ConfigError(f"rows per file are {rows_per_file}, expected at least 1")
    write: Callable[..., dict[str, Any]] = {
        "parquet": _write_parquet,
        "lance": _write_lance,
        "npy": _write_npy,
        "fbin": _write_fbin,
        "u8bin": _write_u8bin,
    }[kind]
    with (
        atomic_folder(out) as partial,
        Progress(desc="writing", unit="vector", total=len(vectors), disable=not progress) as bar,
    ):
        said = write(vectors, partial, rows_per_file, bar)
        if kind in ("npy", "fbin", "u8bin"):
            _write_items(vectors, partial)
        spec = vectors.spec
        manifest = {
            "format": kind,
            "vectors": len(vectors),
            "width": spec.width,
            "model": spec.model,
            "instruction": spec.instruction,
            "stored_as": spec.dtype,
            **said,
            "files": {
                str(path.relative_to(partial)): {
                    "bytes": path.stat().st_size,
                    "sha256": sha256(path),
                }
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            },
        }
        write_json(partial / "manifest.json", manifest)
    return manifest


def _batches(vectors: Vectors, bar: Progress) -> Batches:
    """Yield vectors with their documents."""
    documents = map(document_of, vectors.items())
    for part in vectors.parts(_ROWS_AT_ONCE):
        yield part, list(itertools.islice(documents, len(part)))
        bar.update(len(part))


def _write_parquet(
    vectors: Vectors, folder: Path, rows_per_file: int, bar: Progress
) -> dict[str, Any]:
    with needs("pyarrow"):
        import pyarrow.parquet
    columns = _Columns.of(vectors)
    batches = columns.batches(vectors, bar)
    rest: list[Any] = []
    for number in range(-(-len(vectors) // rows_per_file)):
        path = folder / f"vectors-{number:05}.parquet"
        with pyarrow.parquet.ParquetWriter(path, columns.schema) as writer:
            room = rows_per_file
            while room and (batch := rest.pop() if rest else next(batches, None)) is not None:
                writer.write_batch(batch.slice(0, room))
                if batch.num_rows > room:
                    rest.append(batch.slice(room))
                room -= min(room, batch.num_rows)
    return {"as_json_text": columns.as_json}


def _write_lance(
    vectors: Vectors, folder: Path, rows_per_file: int, bar: Progress
) -> dict[str, Any]:
    with needs("lance"):
        import lance
        import pyarrow
    columns = _Columns.of(vectors)
    reader = pyarrow.RecordBatchReader.from_batches(columns.schema, columns.batches(vectors, bar))
    lance.write_dataset(reader, str(folder / "vectors.lance"), max_rows_per_file=rows_per_file)
    return {"as_json_text": columns.as_json}


def _write_npy(vectors: Vectors, folder: Path, rows_per_file: int, bar: Progress) -> dict[str, Any]:
    written, file = 0, None
    for part, _ in _batches(vectors, bar):
        while len(part):
            place = written % rows_per_file
            if place == 0:
                path = folder / f"vectors-{written // rows_per_file:05}.npy"
                shape = min(rows_per_file, len(vectors) - written), vectors.spec.width
                file = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            assert file is not None
            here = part[: len(file) - place]
            file[place : place + len(here)] = here
            written += len(here)
            part = part[len(here) :]
    return {}


def _write_fbin(vectors: Vectors, folder: Path, _: int, bar: Progress) -> dict[str, Any]:
    with open(folder / "vectors.fbin", "wb") as file:
        _write_header(file, vectors)
        for part, _documents in _batches(vectors, bar):
            file.write(part.astype("<f4").tobytes())
    return {}


def _write_u8bin(vectors: Vectors, folder: Path, _: int, bar: Progress) -> dict[str, Any]:
    scale = max((float(np.abs(part).max()) for part in vectors.parts()), default=1.0)
    with open(folder / "vectors.u8bin", "wb") as file:
        _write_header(file, vectors)
        for part, _documents in _batches(vectors, bar):
            file.write((to_int8(part, scale)[0].astype(np.int16) + 128).astype(np.uint8).tobytes())
    return {"scale": scale, "offset": 128, "metric": "L2"}


def _write_header(file: IO[bytes], vectors: Vectors) -> None:
    file.write(np.array([len(vectors), vectors.spec.width], _HEADER).tobytes())


def _write_items(vectors: Vectors, folder: Path) -> None:
    """Write the ids, and the items with them, one to a line."""
    with (
        open(folder / "ids.txt", "w", encoding="utf-8", newline="\n") as ids,
        open(folder / "items.jsonl", "w", encoding="utf-8", newline="\n") as items,
    ):
        for document in map(document_of, vectors.items()):
            row = {
                "id": document.id,
                "text": document.text,
                "image": document.image,
                "modality": document.modality,
                "fields": dict(document.fields),
            }
            ids.write(f"{document.id}\n")
            items.write(json.dumps(row, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class _Columns:
    """Columns of parquet and Lance for the items of a folder."""

    schema: Any
    names: dict[str, str]
    """Further fields by their columns."""
    as_json: list[str]
    """Fields of several types, which are written as texts that hold JSON."""

    @classmethod
    def of(cls, vectors: Vectors) -> _Columns:
        """Return the columns; a field that has one type in all items has a column of that type.

        Whole numbers beside others are floats.
        """
        import pyarrow

        kinds: dict[str, set[str]] = {}
        for record in vectors.items():
            for name, value in record.fields.items():
                kinds.setdefault(name, set()).update(_kinds(value))
        arrow = {
            "str": pyarrow.string(),
            "bool": pyarrow.bool_(),
            "int": pyarrow.int64(),
            "float": pyarrow.float64(),
        }
        arrow |= {f"list[{name}]": pyarrow.list_(kind) for name, kind in arrow.items()}
        common = {name: _common(found) for name, found in sorted(kinds.items())}
        columns = [("id", arrow["str"])]
        columns += [("vector", pyarrow.list_(pyarrow.float32(), vectors.spec.width))]
        columns += [(name, arrow["str"]) for name in ("text", "image", "modality")]
        names = _column_names(common)
        columns += [(column, arrow[common[name] or "str"]) for column, name in names.items()]
        return cls(
            pyarrow.schema(columns), names, [name for name, kind in common.items() if not kind]
        )

    def batches(self, vectors: Vectors, bar: Progress) -> Iterator[Any]:
        """Yield record batches of vectors with their documents."""
        import pyarrow

        for part, documents in _batches(vectors, bar):
            flat = pyarrow.array(np.ascontiguousarray(part).ravel())
            columns = {
                "id": [document.id for document in documents],
                "text": [document.text for document in documents],
                "image": [document.image for document in documents],
                "modality": [document.modality for document in documents],
            }
            columns |= {
                column: [self._value(document, name) for document in documents]
                for column, name in self.names.items()
            }
            arrays = [
                pyarrow.FixedSizeListArray.from_arrays(flat, vectors.spec.width)
                if field.name == "vector"
                else pyarrow.array(columns[field.name], field.type)
                for field in self.schema
            ]
            yield pyarrow.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _value(self, document: Document, name: str) -> Any:
        found = document.fields.get(name)
        if name in self.as_json and found is not None:
            return json.dumps(found, ensure_ascii=False)
        return found


def _kinds(value: Any) -> set[str]:
    """Return the types of a field's value; of a list, that of its values."""
    if not isinstance(value, list):
        return {type(value).__name__}
    return {f"list[{type(one).__name__}]" for one in value} or {"list[]"}


def _common(kinds: set[str]) -> str | None:
    """Return the type that holds values of some types; None if there is none."""
    if "list[]" in kinds:  # an empty list fits beside any other
        kinds = kinds - {"list[]"} or {"list[str]"}
        if not all(kind.startswith("list") for kind in kinds):
            return None
    for one in ("int", "float"), ("list[int]", "list[float]"):
        if kinds == {*one}:
            return one[1]
    return next(iter(kinds)) if len(kinds) == 1 else None


def _column_names(names: Iterable[str]) -> dict[str, str]:
    """Return fields by the names of their columns, which no two share; Lance takes no dots."""
    columns: dict[str, str] = {}
    for name in names:
        column = name.replace(".", "_")
        while column in _COLUMNS or column in columns:
            column = f"field_{column}"
        columns[column] = name
    return columns
