"""Render a contact sheet: a few test queries of every task and their answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from PIL import Image

from puma_jax.data.mbeir import Candidate, Query
from puma_jax.data.sheet import THUMBNAIL_SIZE, thumbnail

_SAMPLES = 4  # per task


def contact_sheet(
    root: Path, queries: Sequence[Query], documents: Iterable[Candidate], tasks: Collection[int]
) -> Image.Image:
    """Return a picture with a row of samples for each task: query, answer, query, answer...

    Samples are evenly spaced among the queries of a task that the font can show.

    Args:
        root: Folder of the benchmark, which holds the images.
        queries: Queries to take the samples from.
        documents: Documents that hold the answers.
        tasks: Tasks of the benchmark.
    """
    by_did = {document.did: document for document in documents}
    width, height = THUMBNAIL_SIZE
    sheet = Image.new("RGB", (2 * _SAMPLES * width, len(tasks) * height), "white")
    for row, task in enumerate(tasks):
        printable = [q for q in queries if q.task == task and (q.text or "").isascii()]
        step = max(1, len(printable) // _SAMPLES)
        for place, query in enumerate(printable[::step][:_SAMPLES]):
            answer = by_did[query.positives[0]]
            left, top = 2 * place * width, row * height
            for item, mark in ((query, f"task {task}"), (answer, "answer")):
                image = root / item.image if item.image else None
                sheet.paste(thumbnail(image, item.text, mark), (left, top))
                left += width
    return sheet
