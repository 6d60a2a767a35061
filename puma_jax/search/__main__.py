"""Search an index, or a folder of vectors, by a text, an image, or both.

`python -m puma_jax.search --uri runs/index.db --text "a red bicycle"`
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from puma_jax import Embedder, cli
from puma_jax.artifacts import write_text
from puma_jax.config import DType
from puma_jax.data.mbeir import Modality
from puma_jax.errors import ConfigError, one_line
from puma_jax.search.corpus import open_corpus
from puma_jax.search.embedding import embed
from puma_jax.search.index import Hit
from puma_jax.search.indexing import index_vectors
from puma_jax.search.model_source import ModelSource, check_model, source_for
from puma_jax.search.open import is_milvus, open_index
from puma_jax.search.page import results_page
from puma_jax.search.shards import Vectors

_WIDTH = 120
"""Characters in a line where there is no terminal."""
_TEXT_WIDTH = 24
"""Characters that paths of images leave to a text at least."""


def main(
    text: str | None = None,
    image: Path | None = None,
    uri: str | None = None,
    vectors: Path | None = None,
    items: Path | None = None,
    model: str | None = None,
    dtype: DType | None = None,
    ret_token: str | None = None,
    adapter: str | None = None,
    instruction: str | None = None,
    k: int = 10,
    filter: str | None = None,  # noqa: A002
    modality: Modality | None = None,
    collection: str = "items",
    json: bool = False,
    html: Path | None = None,
) -> None:
    """Print the documents that answer a query best.

    Args:
        text: Text of the query.
        image: Image of the query; with a text, both count.
        uri: Index to search: a file of Milvus Lite, or the address of a server.
        vectors: Folder of vectors to search exactly, without a database; with --items, where
            their vectors go.
        items: Folder of images, JSON lines or a table: what is new there is embedded first, and
            put into the index of --uri if one is given.
        model: Hugging Face folder or hub id of the model. By default the one that embedded the
            documents, where it was then.
        dtype: Dtype of weights and activations. By default the one of the documents.
        ret_token: Token that ends every item, such as "<|video_pad|>". By default the one of the
            documents.
        adapter: PEFT folder or hub id of an adapter on the model. By default the one
            of the documents, or none with --model.
        instruction: Instruction before the text of the query, such as "Find a photo."
        k: Number of documents to find.
        filter: Documents to choose from, by their fields: price < 20 and color == "red".
        modality: Kind of documents to choose from.
        collection: Collection of the database.
        json: Print one JSON object in place of a table.
        html: File to write, a page with pictures that needs no other file.
    """
    if not text and image is None:
        raise ConfigError("there is no query: give --text, --image or both")
    if image is not None and not image.is_file():
        raise ConfigError(f"{image} is not a file, expected the image of the query")
    if items is None and (uri is None) == (vectors is None):
        raise ConfigError("give --uri for an index, or --vectors for a folder, or --items")
    embedder = None
    if items is not None:
        if model is None:
            raise ConfigError("--items needs --model, which embeds them")
        if uri is not None and not is_milvus(uri):
            raise ConfigError(
                f"{uri} is no database, expected a file that ends in .db or the address of a "
                "Milvus server: for a folder of vectors give --vectors"
            )
        source = ModelSource.of(model, dtype, ret_token, adapter)
        embedder = source.load()
        vectors = vectors or Path("runs", f"{items.absolute().name}-vectors")
        _bring_up_to_date(items, vectors, uri, collection, source, embedder)
    index = open_index(uri if uri is not None else str(vectors), collection=collection)
    try:
        embedder = embedder or source_for(index.source, model, dtype, ret_token, adapter).load()
        check_model(embedder, index.model)
        started = time.monotonic()
        query = {"text": text or None, "image": image}
        vector = embedder.encode(
            [query], instruction=instruction, dimensions=index.width, progress=False
        )
        (hits,) = index.search(vector, k, modality=modality, filter=filter)
        about = f"{len(hits)} of {len(index):,} documents in {time.monotonic() - started:.2f} s"
    finally:
        index.close()
    if html is not None:
        write_text(
            html, results_page(hits, text=text, image=str(image) if image else None, about=about)
        )
    print(as_json(hits) if json else as_table(hits))
    if not json:
        print(about if html is None else f"{about}; the page is {html}")


def as_json(hits: Sequence[Hit]) -> str:
    """Return what was found as a JSON object, `{"hits": [{"id": ..., "score": ...}, ...]}`."""
    return json.dumps(
        {
            "hits": [
                {
                    "id": hit.document.id,
                    "score": hit.score,
                    "modality": hit.document.modality,
                    "text": hit.document.text,
                    "image": hit.document.image,
                    "fields": dict(hit.document.fields),
                }
                for hit in hits
            ]
        },
        indent=2,
    )


def as_table(hits: Sequence[Hit]) -> str:
    """Return what was found as a table of text, as wide as the terminal."""
    table = Table(box=box.SIMPLE_HEAD, expand=False)
    table.add_column("id", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("modality", no_wrap=True)
    with_text = any(hit.document.text for hit in hits)
    with_image = any(hit.document.image for hit in hits)
    if with_text:
        table.add_column("text", overflow="ellipsis", no_wrap=True, min_width=_TEXT_WIDTH)
    if with_image:
        table.add_column("image", overflow="fold")
    for hit in hits:
        document = hit.document
        cells = [document.id, f"{hit.score:.4f}", document.modality]
        cells += [document.text or ""] * with_text + [document.image or ""] * with_image
        # As they are: rich would read brackets as its own markup.
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    wide = shutil.get_terminal_size((_WIDTH, 0)).columns if sys.stdout.isatty() else _WIDTH
    written = io.StringIO()
    Console(file=written, width=wide).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().rstrip().splitlines())


def _bring_up_to_date(
    items: Path,
    vectors: Path,
    uri: str | None,
    collection: str,
    source: ModelSource,
    embedder: Embedder,
) -> None:
    """Embed what is new among the items, and put it into the index if there is one."""
    corpus = open_corpus(items)
    for note in corpus.notes():
        print(note, file=sys.stderr)
    done = embed(corpus, embedder, vectors, source=source)
    print(f"{done}, in {vectors}", file=sys.stderr)
    if uri is not None:
        indexed = index_vectors(Vectors(vectors), uri, collection=collection)
        print(f"{indexed}, in {uri}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
