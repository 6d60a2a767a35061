"""Open an index, whichever store is behind it."""

from __future__ import annotations

import os
from pathlib import Path

from puma_jax.errors import SearchError
from puma_jax.search.exact import ExactIndex
from puma_jax.search.index import Index


def open_index(uri: str | os.PathLike[str]) -> Index:
    """Return the index in a folder of vectors, which is searched exactly.

    Raises:
        SearchError: There is no such folder, or it cannot be searched.
        VectorsError: The folder of vectors is not complete, or damaged.
    """
    if not Path(uri).is_dir():
        raise SearchError(f"{uri} is no index, expected a folder of vectors")
    return ExactIndex(uri)
