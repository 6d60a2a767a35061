"""Where the model of an index was loaded from, so that queries find it again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from puma_jax.config import DType
from puma_jax.embedder import Embedder
from puma_jax.errors import SearchError


@dataclass(frozen=True)
class ModelSource:
    """What `Embedder.load` was called with."""

    model: str
    """Hub id, or absolute path of a folder."""
    dtype: DType | None = None
    ret_token: str | None = None
    adapter: str | None = None
    """Hub id, or absolute path of a folder."""

    @classmethod
    def of(
        cls, model: str, dtype: DType | None, ret_token: str | None, adapter: str | None = None
    ) -> ModelSource:
        """Return the source of a model, and of an adapter on it, that are folders or hub ids."""
        found = None if adapter is None else _absolute(adapter)
        return cls(_absolute(model), dtype, ret_token, found)

    def load(self, mesh: Mesh | None = None) -> Embedder:
        """Return the model; its weights are read when they are needed.

        Args:
            mesh: As in `Embedder.load`.
        """
        return Embedder.load(
            self.model,
            dtype=self.dtype,
            ret_token=self.ret_token,
            mesh=mesh,
            adapter=self.adapter,
        )


def _absolute(location: str) -> str:
    return os.path.abspath(location) if Path(location).is_dir() else location


def check_model(embedder: Embedder, fingerprint: str) -> None:
    """Refuse a model that is not the one of an index: its vectors are not comparable.

    Raises:
        SearchError: It is another model.
    """
    if embedder.fingerprint != fingerprint:
        raise SearchError(
            f"the index was made by another model ({fingerprint[:12]}, this one is "
            f"{embedder.fingerprint[:12]}): search with the model and dtype that embedded it, or "
            "embed again"
        )
