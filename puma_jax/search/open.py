"""Open an index, whichever store is behind it."""

from __future__ import annotations

import os
from pathlib import Path

from puma_jax.errors import SearchError
from puma_jax.search.exact import ExactIndex
from puma_jax.search.milvus import MilvusIndex


def open_index(
    uri: str | os.PathLike[str], *, collection: str = "items"
) -> ExactIndex | MilvusIndex:
    """Return the index behind an address.

    Args:
        uri: Folder of vectors, which is searched exactly; file of Milvus Lite, such as
            "runs/index.db"; or address of a Milvus server, such as "http://localhost:19530".
        collection: Name of the collection in a Milvus database.

    Raises:
        ConfigError: Milvus' client is not installed.
        SearchError: There is no index at this address, or it cannot be opened.
        VectorsError: The folder of vectors is not complete, or damaged.
    """
    address = str(uri)
    if is_milvus(address):
        return MilvusIndex(address, collection=collection)
    if not Path(address).is_dir():
        raise SearchError(
            f"{address} is no index, expected a folder of vectors, a file that ends in .db, or the "
            "address of a Milvus server that begins with http:// or https://"
        )
    return ExactIndex(address)


def is_milvus(address: str) -> bool:
    """Whether an address is one of Milvus: a server's, or a file's that Milvus Lite keeps."""
    return address.startswith(("http://", "https://")) or address.endswith(".db")
