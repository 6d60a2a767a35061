"""Serve a model and an index over HTTP, with a page to search.

`python -m puma_jax.serve --uri runs/vectors`
"""

from __future__ import annotations

import socket
from pathlib import Path

import jax

from puma_jax import cli
from puma_jax.config import DType
from puma_jax.errors import ConfigError
from puma_jax.model.attention import describe
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.search.model_source import check_model, source_for
from puma_jax.search.open import open_index
from puma_jax.service.settings import ServiceConfig

_DEFAULTS = ServiceConfig()
_ALL_DEVICES = MeshConfig()


def main(
    model: str | None = None,
    uri: str | None = None,
    collection: str = "items",
    dtype: DType | None = None,
    ret_token: str | None = None,
    adapter: str | None = None,
    mesh: MeshConfig = _ALL_DEVICES,
    service: ServiceConfig = _DEFAULTS,
) -> None:
    """Serve embeddings in OpenAI's and Cohere's shape, search, and a page, until it is stopped.

    Args:
        model: Hugging Face folder or hub id of the model. By default the one that embedded the
            documents of the index, where it was then.
        uri: Index to search: a folder of vectors, a file that ends with .db, or the address of a
            Milvus server. Without it, the service only embeds.
        collection: Collection of a Milvus database.
        dtype: Dtype of weights and activations. By default the one of the documents.
        ret_token: Token that ends every item, such as "<|video_pad|>"; for models without a spare
            row for [RET]. By default the one of the documents.
        adapter: PEFT folder or hub id of an adapter on the model, merged when it is read. By
            default the one of the documents.
        mesh: How the local devices share the work.
        service: Settings of the service.
    """
    if model is None and uri is None:
        raise ConfigError("there is nothing to serve: give --uri for an index, or --model")
    key = read_key(service.api_key_file)
    _check_extra()
    from puma_jax.service.server import serve
    from puma_jax.service.state import Service

    with bound_socket(service) as listener:
        index = None if uri is None else open_index(uri, collection=collection)
        known = index.source if index is not None else None
        source = source_for(known, model, dtype, ret_token, adapter)
        embedder = source.load(make_mesh(mesh, jax.local_devices()))
        print(describe(embedder.compute), flush=True)
        if index is not None:
            check_model(embedder, index.model)
        name = service.name or Path(source.model).name
        serve(Service(embedder, index, name, service), key, listener)


def read_key(path: Path | None) -> str | None:
    """Return the key in the first line of a file; None without a file.

    Raises:
        ConfigError: The file cannot be read, or its first line is no key.
    """
    if path is None:
        return None
    try:
        key = path.read_text("utf-8").split("\n")[0].strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--service.api-key-file {path} cannot be read: {error}") from None
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"--service.api-key-file {path}: the first line is not a key of printable ASCII"
        )
    return key


def _check_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"serve needs {error.name}, which is not installed: run pip install -e '.[serve]' in "
            "the clone of puma_jax"
        ) from None


def bound_socket(service: ServiceConfig) -> socket.socket:
    """Return a socket bound to the address of the service, before long work begins.

    Raises:
        ConfigError: The address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((service.host, service.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--service.host {service.host} --service.port {service.port} cannot be used: "
            f"{error.strerror or error}"
        ) from None
    return listener


if __name__ == "__main__":
    cli.run(main)
