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
    """The arguments that `Embedder.load` was called with."""

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


def source_for(
    known: ModelSource | None,
    model: str | None = None,
    dtype: DType | None = None,
    ret_token: str | None = None,
    adapter: str | None = None,
) -> ModelSource:
    """Return where to load the model of an index from: where one says, or where it was then.

    Args:
        known: What the index knows of its model, if anything.
        model: Folder or hub id that comes first; its adapter is then the one given, or none.
        dtype: Dtype of weights and activations, which comes first.
        ret_token: Token that ends every item, which comes first.
        adapter: Folder or hub id of an adapter on the model.

    Raises:
        SearchError: No model is given, and the index does not know its own, or it is gone.
    """
    if known is not None:
        dtype, ret_token = dtype or known.dtype, ret_token or known.ret_token
    if model is not None:
        return ModelSource.of(model, dtype, ret_token, adapter)
    if known is None:
        raise SearchError("the index does not say where its model is: give it with --model")
    if known.model.startswith("/") and not Path(known.model).is_dir():
        raise SearchError(
            f"the model of the index was {known.model}, which is gone: give it with --model"
        )
    return ModelSource.of(known.model, dtype, ret_token, adapter or known.adapter)


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
