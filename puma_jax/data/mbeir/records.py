"""The records of M-BEIR: queries, candidates, relevance judgments, instructions.

Constructors check ids, texts, paths and modalities, so every record that exists is valid.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from puma_jax.data.texts import is_blank, normalize_text
from puma_jax.errors import DataError
from puma_jax.schema import shown

Modality = Literal["image", "text", "image,text"]
MODALITIES: tuple[Modality, ...] = ("image", "text", "image,text")
"""The modalities in the order of their codes, 0 to 2."""

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
"""Modality of the query and of the documents to find, for each task; M-BEIR has no task 5."""

ONE_OF_MODALITIES = f"one of {', '.join(MODALITIES)}"
"""The expected values, as error messages list them."""

InstructionKey = tuple[str, Modality, Modality]
"""Dataset id, modality of the query, modality of the candidate."""


# One word, because qrels separate ids by white space; encodable as UTF-8; and without a byte order
# mark, which would be lost at the start of a file.
_ID = re.compile("[^\\s\0\ufeff\ud800-\udfff]+")


MAX_SCORE = 1e30
"""Scores are kept in float32."""


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
    """Metadata of the original dataset; not used."""
    scores: tuple[tuple[str, float], ...] = ()
    """Scores that a teacher gives documents for this query, by their ids."""

    def __post_init__(self) -> None:
        """Check the query; field names are those of the file.

        Raises:
            DataError: A field is not as the format requires, or contradicts the modality.
        """
        _check_id("qid", self.qid)
        for did in self.positives:
            _check_id("pos_cand_list", did)
        for did in self.negatives:
            _check_id("neg_cand_list", did)
        for did, score in self.scores:
            _check_id("cand_scores", did)
            if not abs(score) <= MAX_SCORE:
                raise DataError(
                    f"cand_scores gives {did} {score}, expected a number of at most {MAX_SCORE:g}"
                )
        _check_task(self.task)
        _check_encodable("query_src_content", self.source)
        _check_content("query_", self.modality, self.text, self.image)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document to retrieve: a text, an image or both."""

    did: str
    text: str | None
    image: str | None
    """Path of a file, relative to the root of the benchmark."""
    modality: Modality
    source: str | None = None
    """Metadata of the original dataset; not used."""

    def __post_init__(self) -> None:
        """Check the candidate; field names are those of the file.

        Raises:
            DataError: A field is not as the format requires, or contradicts the modality.
        """
        _check_id("did", self.did)
        _check_encodable("src_content", self.source)
        _check_content("", self.modality, self.text, self.image)


@dataclass(frozen=True, slots=True)
class Qrel:
    """A judgment of how relevant a document is to a query; above 0, the document answers it."""

    qid: str
    did: str
    relevance: int
    task: int

    def __post_init__(self) -> None:
        """Check the judgment.

        Raises:
            DataError: An id is not one word, or the task does not exist.
        """
        _check_id("qid", self.qid)
        _check_id("did", self.did)
        _check_task(self.task)


@dataclass(frozen=True, slots=True)
class Instruction:
    """Wordings of what a query looks for; one of them comes before the text of the query."""

    query_modality: Modality
    candidate_modality: Modality
    dataset_name: str
    dataset_id: str
    """The prefix of query ids; "" for queries whose ids have no ":"."""
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the instruction.

        Raises:
            DataError: There is no prompt, a prompt is empty, or a cell would break the table.
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
        """The `instruction_key` of a matching query."""
        return self.dataset_id, self.query_modality, self.candidate_modality


def modality_code(modality: Modality) -> int:
    """Return the number of a modality: image 0, text 1, image,text 2."""
    return MODALITIES.index(modality)


def dataset_id(identifier: str) -> str:
    """Return the dataset of a qid or did: the part before the first ":", "" without one.

    >>> dataset_id("9:6")
    '9'
    """
    return identifier.partition(":")[0] if ":" in identifier else ""


def content_key(text: str | None, image: str | None) -> int:
    """Return 64 bits that tell the content of a document: equal for equal contents.

    Identity is by content, not by id: documents whose keys are equal have equal vectors. Among ten
    million documents, the probability that two others get one key is 1 in 400,000.

    Args:
        text: The text of a record; compared as the model reads it, see `texts.normalize_text`.
        image: A digest of the image file, or its path where files are not read.
    """
    content = f"{image or ''}\0{normalize_text(text)}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def negatives_note(queries: int, negatives: int) -> str:
    """Return what to tell a user whose training queries have hard negatives."""
    return (
        f"neg_cand_list of {queries:,} training queries holds {negatives:,} ids: stages with "
        "plan.hard_negatives draw hard negatives from them"
    )


def instruction_key(query: Query) -> InstructionKey:
    """Return the key of the instruction of a query in the result of `read_instructions`.

    It depends on the query alone, because positives of OVEN queries may be documents of InfoSeek
    and vice versa, and would name the wrong dataset.
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
    """Refuse half of a surrogate pair, which JSON can hold but UTF-8 and tokenizers cannot."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} {shown(text)} holds half of a surrogate pair") from None


def _check_cell(name: str, cell: str) -> None:
    """Refuse a cell that would not be read from a table as it was written."""
    _check_encodable(name, cell)
    if cell != cell.strip() or any(sign in cell for sign in "\t\n\0"):
        raise DataError(
            f"{name} {shown(cell)} has white space around it, or a tab or newline within"
        )


def _check_content(prefix: str, modality: str, text: str | None, image: str | None) -> None:
    """Check that the modality names exactly the parts that are present."""
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
    if modality == "text" and is_blank(text):
        # Quotes are no part of the text that a model reads, so nothing would be left of it.
        raise DataError(f"{prefix}txt is {shown(text)}, which leaves no text")
    # Data from others must not name files outside the benchmark.
    if image and (image.startswith("/") or ".." in image.split("/") or "\0" in image):
        raise DataError(f"{prefix}img_path {shown(image)} is not a path below the root")
