"""What M-BEIR is made of: queries, candidates, relevance judgements, instructions.

A record that exists is sound: constructors check ids, texts, paths and modalities, so that readers
and writers need not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from puma_jax.data.mbeir.lines import shown
from puma_jax.errors import DataError

Modality = Literal["image", "text", "image,text"]
MODALITIES: tuple[Modality, ...] = ("image", "text", "image,text")
"""In the order of their codes, 0 to 2."""

TASKS: dict[int, tuple[Modality, Modality]] = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}
"""Modality of the query and of the documents it looks for, of each task; M-BEIR has no task 5."""

ONE_OF_MODALITIES = f"one of {', '.join(MODALITIES)}"
"""What an error message says is expected."""

InstructionKey = tuple[str, Modality, Modality]
"""Dataset id, modality of the query, modality of the candidate."""


# One word, because qrels separate ids by white space; encodable; and no byte order mark, which
# would be lost at the start of a file.
_ID = re.compile("[^\\s\0\ufeff\ud800-\udfff]+")


@dataclass(frozen=True, slots=True)
class Query:
    """A text, an image or both, and the documents that answer it."""

    qid: str
    text: str | None
    image: str | None
    """Path of a file, relative to the root of the benchmark."""
    modality: Modality
    positives: tuple[str, ...]
    """Ids of documents that answer the query."""
    task: int
    negatives: tuple[str, ...] = ()
    source: str | None = None
    """What the original dataset had to say; not used."""

    def __post_init__(self) -> None:
        """Check the query; field names are those of the file.

        Raises:
            DataError: A field is not what the format wants, or contradicts the modality.
        """
        _check_id("qid", self.qid)
        for did in self.positives:
            _check_id("pos_cand_list", did)
        for did in self.negatives:
            _check_id("neg_cand_list", did)
        _check_task(self.task)
        _check_encodable("query_src_content", self.source)
        _check_content("query_", self.modality, self.text, self.image)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document that can be found: a text, an image or both."""

    did: str
    text: str | None
    image: str | None
    """Path of a file, relative to the root of the benchmark."""
    modality: Modality
    source: str | None = None
    """What the original dataset had to say; not used."""

    def __post_init__(self) -> None:
        """Check the candidate; field names are those of the file.

        Raises:
            DataError: A field is not what the format wants, or contradicts the modality.
        """
        _check_id("did", self.did)
        _check_encodable("src_content", self.source)
        _check_content("", self.modality, self.text, self.image)


@dataclass(frozen=True, slots=True)
class Qrel:
    """A judgement: how relevant a document is to a query; above 0, it answers it."""

    qid: str
    did: str
    relevance: int
    task: int

    def __post_init__(self) -> None:
        """Check the judgement.

        Raises:
            DataError: An id is not one word, or there is no such task.
        """
        _check_id("qid", self.qid)
        _check_id("did", self.did)
        _check_task(self.task)


@dataclass(frozen=True, slots=True)
class Instruction:
    """Ways to say what is looked for; a query is asked with one of them before its own text."""

    query_modality: Modality
    candidate_modality: Modality
    dataset_name: str
    dataset_id: str
    """As in the ids of queries; "" for queries whose ids have no ":"."""
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the instruction.

        Raises:
            DataError: There is no prompt, one is empty, or a cell would break the table.
        """
        _check_modality("query_modality", self.query_modality)
        _check_modality("cand_modality", self.candidate_modality)
        _check_cell("dataset_name", self.dataset_name)
        _check_cell("dataset_id", self.dataset_id)
        for number, prompt in enumerate(self.prompts, 1):
            _check_cell(f"prompt_{number}", prompt)
        if not all(self.prompts) or not self.prompts:
            raise DataError("prompt_1 is missing: an instruction needs a prompt, and none empty")

    @property
    def key(self) -> InstructionKey:
        """What `instruction_key` of a matching query returns."""
        return self.dataset_id, self.query_modality, self.candidate_modality


def modality_code(modality: Modality) -> int:
    """Return the number of a modality: image 0, text 1, image,text 2."""
    return MODALITIES.index(modality)


def dataset_id(identifier: str) -> str:
    """Return the dataset that a qid or did names: the part before the first ":", "" without one.

    >>> dataset_id("9:6")
    '9'
    """
    return identifier.partition(":")[0] if ":" in identifier else ""


def instruction_key(query: Query) -> InstructionKey:
    """Return the key, in what `read_instructions` returns, of the query's instruction.

    It depends on the query alone: positives of OVEN queries may be documents of InfoSeek and the
    other way round, and these would name the wrong dataset.
    """
    return dataset_id(query.qid), query.modality, TASKS[query.task][1]


def _check_id(name: str, identifier: str) -> None:
    if not _ID.fullmatch(identifier):
        raise DataError(f"{name} {shown(identifier)} is not an id: one word, without white space")


def _check_task(task: int) -> None:
    if task not in TASKS:
        raise DataError(f"task_id {shown(task)} is not one of {', '.join(map(str, TASKS))}")


def _check_modality(name: str, modality: str) -> None:
    if modality not in MODALITIES:
        raise DataError(f"{name} {shown(modality)} is not {ONE_OF_MODALITIES}")


def _check_encodable(name: str, text: str | None) -> None:
    """Refuse half a surrogate pair, which JSON can spell but neither UTF-8 nor a tokenizer can."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} {shown(text)} holds half of a surrogate pair") from None


def _check_cell(name: str, cell: str) -> None:
    """Refuse what would not come back from a table as it went in."""
    _check_encodable(name, cell)
    if cell != cell.strip() or any(sign in cell for sign in "\t\n\0"):
        raise DataError(
            f"{name} {shown(cell)} has white space around it, or a tab or newline within"
        )


def _check_content(prefix: str, modality: str, text: str | None, image: str | None) -> None:
    """Check that there is what the modality says, and nothing else."""
    _check_modality(f"{prefix}modality", modality)
    for name, kind, value in (("txt", "text", text), ("img_path", "image", image)):
        said = kind in modality.split(",")
        if said and (not value or value.isspace()):
            raise DataError(f'{prefix}{name} is missing, but {prefix}modality is "{modality}"')
        if not said and value is not None:
            raise DataError(
                f'{prefix}{name} is {shown(value)}, but {prefix}modality is "{modality}"'
            )
        _check_encodable(f"{prefix}{name}", value)
    # Data of others must not name files outside of the benchmark.
    if image and (image.startswith("/") or ".." in image.split("/") or "\0" in image):
        raise DataError(f"{prefix}img_path {shown(image)} is not a path below the root")
