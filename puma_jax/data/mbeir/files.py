"""Readers and writers of the files of M-BEIR: jsonl of queries and pools, qrels, instructions.

`layout` finds the files in a folder; `validation` checks that they are consistent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from puma_jax.data.lines import (
    BadRecords,
    FilePath,
    OnBadRecord,
    decode_line,
    json_object,
    read_records,
    write_lines,
)
from puma_jax.data.mbeir.records import (
    MAX_SCORE,
    MODALITIES,
    ONE_OF_MODALITIES,
    Candidate,
    Instruction,
    InstructionKey,
    Modality,
    Qrel,
    Query,
)
from puma_jax.errors import DataError
from puma_jax.schema import shown

_SPELLINGS: dict[str, Modality] = {name: name for name in MODALITIES} | {"text,image": "image,text"}
_INSTRUCTION_COLUMNS = ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
_INTEGER = re.compile("-?[0-9]{1,18}")
_ENCODER = json.JSONEncoder(ensure_ascii=False)

_Value = TypeVar("_Value")


def read_queries(
    path: FilePath, *, on_bad_record: OnBadRecord = "error", skipped: BadRecords | None = None
) -> Iterator[Query]:
    """Yield the queries of a jsonl file; see `read_records` for arguments and errors."""
    return read_records(path, parse_query, on_bad_record=on_bad_record, skipped=skipped)


def read_candidates(
    path: FilePath, *, on_bad_record: OnBadRecord = "error", skipped: BadRecords | None = None
) -> Iterator[Candidate]:
    """Yield the documents of a pool; see `read_records` for arguments and errors."""
    return read_records(path, parse_candidate, on_bad_record=on_bad_record, skipped=skipped)


def read_qrels(
    path: FilePath, *, on_bad_record: OnBadRecord = "error", skipped: BadRecords | None = None
) -> Iterator[Qrel]:
    """Yield the judgments with a relevance above 0; see `read_records` for arguments and errors.

    Documents may be missing from the pool of the set, as some of OVEN and InfoSeek are.
    """
    for qrel in read_records(path, parse_qrel, on_bad_record=on_bad_record, skipped=skipped):
        if qrel.relevance > 0:
            yield qrel


def read_instructions(path: FilePath) -> dict[InstructionKey, Instruction]:
    """Return the instructions of a table by their keys.

    Raises:
        DataError: The file cannot be read, a row is bad, or two rows have the same key.
    """
    instructions: dict[InstructionKey, Instruction] = {}

    def parse(line: bytes) -> Instruction | None:
        instruction = parse_instruction(line)
        if instruction and instruction.key in instructions:
            raise DataError(f"a second row for {', '.join(map(shown, instruction.key))}")
        return instruction

    for instruction in read_records(path, parse):
        instructions[instruction.key] = instruction
    return instructions


def write_queries(path: FilePath, queries: Iterable[Query]) -> int:
    """Write queries to a jsonl file and return their number; see `write_lines`."""
    return write_lines(
        path,
        (
            _ENCODER.encode(
                {
                    "qid": query.qid,
                    "query_txt": query.text,
                    "query_img_path": query.image,
                    "query_modality": query.modality,
                    "query_src_content": query.source,
                    "pos_cand_list": query.positives,
                    "neg_cand_list": query.negatives,
                    "task_id": query.task,
                    **({"cand_scores": dict(query.scores)} if query.scores else {}),
                }
            )
            for query in queries
        ),
    )


def write_candidates(path: FilePath, candidates: Iterable[Candidate]) -> int:
    """Write the documents of a pool to a jsonl file and return their number; see `write_lines`."""
    return write_lines(
        path,
        (
            _ENCODER.encode(
                {
                    "txt": candidate.text,
                    "img_path": candidate.image,
                    "modality": candidate.modality,
                    "did": candidate.did,
                    "src_content": candidate.source,
                }
            )
            for candidate in candidates
        ),
    )


def write_qrels(path: FilePath, qrels: Iterable[Qrel]) -> int:
    """Write judgments and return their number; see `write_lines`."""
    return write_lines(
        path, (f"{qrel.qid} 0 {qrel.did} {qrel.relevance} {qrel.task}" for qrel in qrels)
    )


def write_instructions(path: FilePath, instructions: Iterable[Instruction]) -> int:
    """Write a table of instructions and return their number; see `write_lines`."""
    rows = list(instructions)
    prompts = max((len(row.prompts) for row in rows), default=1)
    table = [[*_INSTRUCTION_COLUMNS, *(f"prompt_{number + 1}" for number in range(prompts))]]
    for row in rows:
        empty = [""] * (prompts - len(row.prompts))
        names = [row.query_modality, row.candidate_modality, row.dataset_name, row.dataset_id]
        table.append([*names, *row.prompts, *empty])
    return write_lines(path, map("\t".join, table)) - 1


def parse_query(line: bytes) -> Query:
    """Return the query of a line of jsonl.

    Raises:
        DataError: The line is not JSON, or a field is not as the format requires.
    """
    row = json_object(line)
    return Query(
        qid=_field(row, "qid", str, "an id"),
        text=_content(row, "query_txt"),
        image=_content(row, "query_img_path"),
        modality=_modality("query_modality", _field(row, "query_modality", str, ONE_OF_MODALITIES)),
        positives=_ids(row, "pos_cand_list"),
        task=_field(row, "task_id", int, "a whole number"),
        negatives=() if row.get("neg_cand_list") is None else _ids(row, "neg_cand_list"),
        source=_text_or_none(row, "query_src_content"),
        scores=() if row.get("cand_scores") is None else _scores(row),
    )


def parse_candidate(line: bytes) -> Candidate:
    """Return the document of a line of jsonl.

    Raises:
        DataError: The line is not JSON, or a field is not as the format requires.
    """
    row = json_object(line)
    return Candidate(
        did=_field(row, "did", str, "an id"),
        text=_content(row, "txt"),
        image=_content(row, "img_path"),
        modality=_modality("modality", _field(row, "modality", str, ONE_OF_MODALITIES)),
        source=_text_or_none(row, "src_content"),
    )


def parse_qrel(line: bytes) -> Qrel:
    """Return the judgment of a line: qid, an unused column, did, relevance, task id.

    Raises:
        DataError: There are not five columns, or one is not as the format requires.
    """
    cells = decode_line(line).split()
    if len(cells) != 5:
        raise DataError(f"{len(cells)} columns, expected 5: qid 0 did relevance task_id")
    qid, _, did, relevance, task = cells
    return Qrel(qid, did, _integer("relevance", relevance), _integer("task_id", task))


def parse_instruction(line: bytes) -> Instruction | None:
    """Return the instruction of a row of the table, None for the header.

    Raises:
        DataError: A column is missing or is not as the format requires.
    """
    cells = [cell.strip() for cell in decode_line(line).split("\t")]
    if cells[:4] == _INSTRUCTION_COLUMNS:
        return None
    if len(cells) < 5:
        columns = " ".join(_INSTRUCTION_COLUMNS)
        raise DataError(f"{len(cells)} columns, expected tabs between {columns} prompt_1 ...")
    return Instruction(
        query_modality=_modality("query_modality", cells[0]),
        candidate_modality=_modality("cand_modality", cells[1]),
        dataset_name=cells[2],
        dataset_id=cells[3],
        prompts=tuple(filter(None, cells[4:])),
    )


def _field(row: dict[str, Any], name: str, kind: type[_Value], expected: str) -> _Value:
    """Return a required field of one type."""
    value = row.get(name)
    if type(value) is kind:  # isinstance would take true for a number
        return value
    if name not in row:
        raise DataError(f"{name} is missing, expected {expected}")
    raise DataError(f"{name} {shown(value)} is not {expected}")


def _text_or_none(row: dict[str, Any], name: str) -> str | None:
    """Return a field that may be null or absent."""
    return None if row.get(name) is None else _field(row, name, str, "a text or null")


def _content(row: dict[str, Any], name: str) -> str | None:
    """Return a text or path, None if it is null, absent or blank."""
    if isinstance(row.get(name), list):
        raise DataError(
            f"{name} {shown(row[name])} is a list, expected one path: items of several images are "
            "read from JSON lines with id, text and image, to embed and to search"
        )
    text = _text_or_none(row, name)
    return text if text and not text.isspace() else None


def _modality(name: str, spelling: str) -> Modality:
    """Return the modality of either spelling."""
    if spelling not in _SPELLINGS:
        raise DataError(f"{name} {shown(spelling)} is not {ONE_OF_MODALITIES}")
    return _SPELLINGS[spelling]


def _ids(row: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return a list of ids, given as they are or as {"did": id}."""
    ids = []
    for entry in _field(row, name, list, "a list of ids"):
        did = entry.get("did") if isinstance(entry, dict) else entry
        if not isinstance(did, str):
            raise DataError(f'{name} holds {shown(entry)}, expected an id or {{"did": id}}')
        ids.append(did)
    return tuple(ids)


def _scores(row: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """Return the scores of documents by their ids."""
    scores = _field(row, "cand_scores", dict, "an object of scores by id")
    for did, score in scores.items():
        if type(score) not in (int, float) or not abs(score) <= MAX_SCORE:
            raise DataError(
                f"cand_scores gives {shown(did)} {shown(score)}, expected a number of at most "
                f"{MAX_SCORE:g}"
            )
    return tuple((did, float(score)) for did, score in scores.items())


def _integer(name: str, cell: str) -> int:
    """Return the number in a cell; `int` alone would take "1_0"."""
    if not _INTEGER.fullmatch(cell):
        raise DataError(f"{name} {shown(cell)} is not a whole number")
    return int(cell)
