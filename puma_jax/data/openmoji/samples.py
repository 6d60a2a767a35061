"""The contact sheet: a few test queries of every task beside what answers them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from puma_jax.data.mbeir import TASKS, Candidate, Query
from puma_jax.data.openmoji.catalogue import Documents

_SAMPLES = 4  # of each task
_CELL = (150, 96)  # width and height of a query or an answer, in pixels
_PICTURE = 44
_LINES = 3
_FONT_SIZE = 10


def contact_sheet(root: Path, queries: Sequence[Query], documents: Documents) -> Image.Image:
    """Return a picture with a row of samples for each task: query, answer, query, answer...

    Samples are taken at equal distances in the queries of a task, among those that the font can
    show.

    Args:
        root: Folder of the benchmark, where the images are.
        queries: To take the samples from.
        documents: What answers them.
    """
    by_did = {document.did: document for document in documents.union()}
    width, height = _CELL
    sheet = Image.new("RGB", (2 * _SAMPLES * width, len(TASKS) * height), "white")
    for row, task in enumerate(TASKS):
        printable = [q for q in queries if q.task == task and (q.text or "").isascii()]
        step = max(1, len(printable) // _SAMPLES)
        for place, query in enumerate(printable[::step][:_SAMPLES]):
            answer = by_did[query.positives[0]]
            left, top = 2 * place * width, row * height
            sheet.paste(_cell(root, query, f"task {task}"), (left, top))
            sheet.paste(_cell(root, answer, "answer"), (left + width, top))
    return sheet


def _cell(root: Path, item: Query | Candidate, mark: str) -> Image.Image:
    """Return a query or document as a small picture with its text below."""
    cell = Image.new("RGB", _CELL, "white")
    pen, font = ImageDraw.Draw(cell), ImageFont.load_default(_FONT_SIZE)
    pen.text((4, 2), mark, "gray", font)
    top = 16
    if item.image:
        with Image.open(root / item.image) as picture:
            cell.paste(picture.resize((_PICTURE, _PICTURE)), (50, 4))
        top = _PICTURE + 6
    lines = textwrap.wrap(item.text or "", width=25, max_lines=_LINES, placeholder="...")
    pen.text((4, top), "\n".join(lines), "black", font)
    return cell
