"""Training data in M-BEIR layout from a table of pairs: texts, images or both, with hard negatives.

`python -m puma_jax.data.text_pairs --table nli_for_simcse.csv --out nli` writes a folder in M-BEIR
layout, which is trained on like any other. A table is a file of CSV, TSV, JSON lines or parquet, or
a dataset of Hugging Face.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from puma_jax import artifacts, cli
from puma_jax.data.lines import BadRecords, FilePath, OnBadRecord, reject
from puma_jax.data.mbeir.files import write_candidates, write_queries
from puma_jax.data.mbeir.records import Candidate, Query
from puma_jax.data.pair_rows import Pair, PairColumns, PairTable, Part
from puma_jax.errors import ConfigError, DataError
from puma_jax.files import read_object
from puma_jax.schema import CountOrZero, shown

_MANIFEST = "text_pairs.json"
"""Says that a folder was written from a table of pairs, and which."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_ROWS_IN_FOLDER = 1000
_SIMCSE = PairColumns()


@dataclass(frozen=True)
class _Manifest:
    name: str
    table: str
    """SHA-256 of the table, or the fingerprint of a dataset."""
    columns: PairColumns
    images: str | None
    on_bad_record: OnBadRecord
    pairs: CountOrZero
    skipped: CountOrZero
    messages: list[str]
    negatives: CountOrZero
    """Hard negatives of all pairs."""


def write_benchmark(
    table: FilePath,
    out: FilePath,
    *,
    columns: PairColumns = _SIMCSE,
    images: FilePath | None = None,
    name: str = "pairs",
    on_bad_record: OnBadRecord = "error",
    skipped: BadRecords | None = None,
) -> int:
    """Write the pairs of a table as training data in M-BEIR layout; return their number.

    Queries have no instruction. Ids are numbers of rows. The table is read twice, so that memory
    does not grow with it, except by the numbers of bad rows. Images are hard links to the files
    where the file system allows them, and copies elsewhere. A folder that was written from the same
    table is left as it is.

    Args:
        table: The table; see `pair_rows.PairTable`.
        out: Folder to write: empty, missing, or written by this function with the same arguments.
        columns: Names of the columns.
        images: Folder that holds the images; that of the table by default.
        name: Name of the set, and of the dataset in all ids.
        on_bad_record: "error" stops at a bad row, "skip" leaves it out.
        skipped: Counts the bad rows that were skipped.

    Raises:
        ConfigError: The name cannot be part of a file name and of an id, or columns are missing.
        ArtifactError: The folder holds something else, or cannot be written.
        DataError: The table cannot be read, or a row is bad and `on_bad_record` is "error".
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name {shown(name)} must be letters, digits, _, . and -, at most 100, "
            "the first of them a letter or digit"
        )
    skipped = skipped if skipped is not None else BadRecords()
    out, table = Path(out), Path(table)
    root = None if images is None else Path(images)
    rows = PairTable(table, columns, root)
    job = {
        "name": name,
        "table": rows.fingerprint,
        "columns": asdict(rows.columns),
        "images": None if root is None else str(root.absolute()),
        "on_bad_record": on_bad_record,
    }
    if (out / _MANIFEST).exists():
        results = ("pairs", "skipped", "messages", "negatives")
        artifacts.claim(out, _MANIFEST, job, what="text pairs", may_differ=results)
        found = read_object(out / _MANIFEST, _Manifest)
        skipped.count, skipped.messages = found.skipped, found.messages
        return found.pairs
    with artifacts.atomic_folder(out) as partial:
        writer = _Writer(rows, name, partial, on_bad_record, skipped)
        write_candidates(
            partial / "cand_pool/global/mbeir_union_train_cand_pool.jsonl", writer.documents()
        )
        pairs = write_queries(partial / f"query/train/mbeir_{name}_train.jsonl", writer.queries())
        if PairTable(table, columns, root).fingerprint != rows.fingerprint:
            raise DataError(f"{table} changed while it was read: run the same command again")
        result = {"pairs": pairs, "skipped": skipped.count, "messages": skipped.messages}
        negatives = {"negatives": writer.count["negatives"]}
        artifacts.write_json(partial / _MANIFEST, {**job, **result, **negatives})
    return pairs


class _Writer:
    """Records of the pairs of a table: first the documents, then the queries.

    Images of both are stored with the documents.
    """

    def __init__(
        self,
        rows: PairTable,
        name: str,
        folder: Path,
        on_bad_record: OnBadRecord,
        skipped: BadRecords,
    ):
        self.count: Counter[str] = Counter(negatives=0)
        self._rows, self._name, self._folder = rows, name, folder
        self._on_bad_record, self._skipped = on_bad_record, skipped
        self._bad: set[int] = set()
        """Rows with an image that cannot be stored."""

    def documents(self) -> Iterator[Candidate]:
        """Yield the documents of all pairs and store all images. Bad rows are counted."""
        for pair in self._rows.pairs(self._on_bad_record, self._skipped):
            try:
                for role, part in _parts(pair):
                    self._store(pair, role, part)
            except OSError as error:
                self._bad.add(pair.row)
                said = f"row {pair.row}: an image cannot be read: {error.strerror or error}"
                reject(DataError(said), self._on_bad_record, self._skipped)
                continue
            for role, part in _parts(pair)[1:]:
                yield Candidate(
                    self._id(pair, role), part.text, self._path(pair, role, part), part.modality
                )

    def queries(self) -> Iterator[Query]:
        """Yield the queries of all pairs."""
        for pair in self._rows.pairs(self._on_bad_record):
            if pair.row not in self._bad:
                roles = [role for role, _ in _parts(pair)]
                self.count["negatives"] += len(pair.negatives)
                yield Query(
                    self._id(pair, "document"),
                    pair.query.text,
                    self._path(pair, "query", pair.query),
                    pair.query.modality,
                    positives=(self._id(pair, "document"),),
                    task=pair.task,
                    negatives=tuple(self._id(pair, role) for role in roles[2:]),
                )

    def _id(self, pair: Pair, role: str) -> str:
        suffix = "" if role == "document" else f"-{role}"
        return f"{self._name}:{pair.row}{suffix}"

    def _path(self, pair: Pair, role: str, part: Part) -> str | None:
        """Return the path of an image, relative to the root of the benchmark."""
        if part.image is None:
            return None
        suffix = part.image.suffix if isinstance(part.image, Path) else ""
        folder = f"mbeir_images/{self._name}/{pair.row // _ROWS_IN_FOLDER:05}"
        return f"{folder}/{pair.row}-{role}{suffix}"

    def _store(self, pair: Pair, role: str, part: Part) -> None:
        path = self._path(pair, role, part)
        if path is None:
            return
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(part.image, Path):
            artifacts.link_or_copy(part.image, target)
        elif part.image is not None:
            target.write_bytes(part.image)


def _parts(pair: Pair) -> list[tuple[str, Part]]:
    """Return the query, the document and the negatives of a pair, each by its role."""
    negatives = [(f"negative-{number}", part) for number, part in enumerate(pair.negatives, 1)]
    return [("query", pair.query), ("document", pair.document), *negatives]


def main(
    table: Path,
    out: Path,
    columns: tyro.conf.OmitArgPrefixes[PairColumns] = _SIMCSE,
    images: Path | None = None,
    name: str = "pairs",
    on_bad_record: OnBadRecord = "error",
) -> None:
    """Write training data in M-BEIR layout from a table of pairs.

    Args:
        table: A file that ends in .csv, .tsv or .parquet, a file of JSON lines, a folder that
            Dataset.save_to_disk wrote, or "hf:NAME" for a dataset on the hub.
        out: Folder to write: empty, missing, or written from the same table before.
        columns: Names of the columns.
        images: Folder that holds the images, and that their paths are relative to. The folder of
            the table by default.
        name: Name of the set, and of the dataset in all ids.
        on_bad_record: "error" stops at a bad row, "skip" leaves it out and counts it.
    """
    skipped = BadRecords()
    pairs = write_benchmark(
        table,
        out,
        columns=columns,
        images=images,
        name=name,
        on_bad_record=on_bad_record,
        skipped=skipped,
    )
    for message in skipped.messages:
        print(f"skipped {message}")
    found = read_object(out / _MANIFEST, _Manifest)
    unused = PairTable(table, found.columns, images).unused
    if unused:
        print(f"Columns that are not used: {', '.join(unused)}")
    for column in unused:
        if "neg" in column.lower():
            print(f"{column} seems to hold hard negatives: name it with --negatives to use them")
    print(
        f"{pairs:,} pairs are in {out}, with {found.negatives:,} hard negatives; "
        f"{skipped.count:,} bad rows were skipped"
    )
    if found.negatives:
        print("Stages draw hard negatives with plan.hard_negatives above 0")


if __name__ == "__main__":
    cli.run(main)
