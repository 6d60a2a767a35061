"""Put vectors into a database: a file of Milvus Lite, a Milvus server or a cluster.

`python -m puma_jax.index --vectors runs/vectors --uri runs/index.db`
"""

from __future__ import annotations

from pathlib import Path

from puma_jax import cli
from puma_jax.search.indexing import index_vectors
from puma_jax.search.milvus import IndexType, Metric, StoredDType
from puma_jax.search.shards import Vectors


def main(
    vectors: Path,
    uri: str,
    collection: str = "items",
    index_type: IndexType | None = None,
    metric: Metric | None = None,
    dtype: StoredDType = "float32",
) -> None:
    """Make a database hold a folder of vectors. Rerun it after a stop, or after embedding again.

    A rerun adds, replaces and removes the documents that have changed, and no others. The
    environment variable MILVUS_TOKEN logs in at a server.

    Args:
        vectors: Folder that `python -m puma_jax.embed` wrote.
        uri: File of Milvus Lite, which ends in .db, or address of a server, such as
            http://localhost:19530.
        collection: Collection of the database; created if it is missing.
        index_type: How vectors are searched: FLAT compares with all of them. By default FLAT for
            at most 50,000 documents, and HNSW for more; a collection that exists keeps its own.
        metric: How vectors are compared; the scores of both are the same but for rounding. IP by
            default, COSINE for int8.
        dtype: Dtype of the vectors in the database. Milvus Lite holds float32 only.
    """
    done = index_vectors(
        Vectors(vectors),
        uri,
        collection=collection,
        index_type=index_type,
        metric=metric,
        dtype=dtype,
    )
    print(f"{done}, in {uri}")


if __name__ == "__main__":
    cli.run(main)
