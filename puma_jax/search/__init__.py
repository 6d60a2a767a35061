"""Search by inner product, and embed a corpus into shards of vectors."""
