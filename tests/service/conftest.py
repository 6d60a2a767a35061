"""One model, one index and one service for all tests of a file."""

import pytest

from puma_jax.search.open import open_index
from tests.service.serving import embed_corpus, serving, small_embedder


@pytest.fixture(scope="session")
def embedder(tiny):
    return small_embedder(tiny.folder)


@pytest.fixture(scope="session")
def vectors(embedder, tmp_path_factory):
    return embed_corpus(embedder, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def live(embedder, vectors):
    with serving(embedder, open_index(vectors)) as live:
        yield live
