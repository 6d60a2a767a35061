"""What an index holds and answers, whichever store is behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from puma_jax.data.mbeir import Modality
from puma_jax.typing import Float, ndarray


@dataclass(frozen=True)
class Document:
    """An item of an index, without its vector."""

    id: str
    """Id of the item in its corpus."""
    text: str | None = None
    """Text of the item; None if it is an image alone."""
    image: str | None = None
    """Absolute path of the image file; None if it is a text alone."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the item in its corpus, which filters can name."""

    @property
    def modality(self) -> Modality:
        """The parts that the item consists of: "text", "image" or "image,text"."""
        if self.image is None:
            return "text"
        return "image" if self.text is None else "image,text"


@dataclass(frozen=True)
class Hit:
    """A document that was found."""

    document: Document
    score: float
    """Inner product of the unit vectors of query and document, from -1 to 1."""


@runtime_checkable
class Index(Protocol):
    """Documents and their vectors, to search. Several threads may call its methods at once."""

    model: str
    """Fingerprint of the model that made the vectors; see `Embedder.fingerprint`."""
    instruction: str | None
    """Instruction that the documents were embedded with; None for none."""
    width: int
    """Values in a vector."""

    def __len__(self) -> int:
        """Return the number of documents."""
        ...

    def search(
        self,
        vectors: Float[ndarray, "queries width"],
        k: int,
        *,
        modality: Modality | None = None,
        filter: str | None = None,  # noqa: A002 (the name that stores use)
    ) -> list[list[Hit]]:
        """Return the k best documents of each query, best first; fewer if fewer match.

        Args:
            vectors: Unit vectors of the queries.
            k: Documents to return for each query.
            modality: Only documents of this modality; None for all.
            filter: Expression over the documents' further fields, such as
                `price < 20 and color == "red"`; None for all.

        Raises:
            SearchError: The filter cannot be read, or names a field that no document has.
        """
        ...

    def documents(self, ids: Sequence[str]) -> list[Document | None]:
        """Return the documents with these ids; None for an id that the index does not hold."""
        ...

    def vectors(self, ids: Sequence[str]) -> Float[ndarray, "n width"]:
        """Return the float32 vectors of these ids.

        Raises:
            SearchError: The index does not hold an id.
        """
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...
