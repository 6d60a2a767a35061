"""Render the results of an evaluation: queries of every set beside their first documents."""

from __future__ import annotations

from PIL import Image

from puma_jax.data.sheet import THUMBNAIL_SIZE, thumbnail
from puma_jax.evaluation.report import Evaluation, Pool
from puma_jax.evaluation.selection import Selection

_QUERIES = 3  # per set
_DOCUMENTS = 5  # per query


def render_results(
    selection: Selection, evaluation: Evaluation, pool: Pool = "global"
) -> Image.Image:
    """Return a picture with a query and its first documents in each row; relevant ones are green.

    Queries are evenly spaced among those of a set whose text is ASCII, which the font can show.

    Args:
        selection: Selection that was evaluated.
        evaluation: Its evaluation, with runs.
        pool: Pool that was searched.
    """
    rows = []
    for query_set, result in zip(selection.sets, evaluation.sets, strict=True):
        run = result.runs[pool]
        found = dict(zip(run.qids, run.rows.tolist(), strict=True))  # unreadable ones are not there
        printable = [
            number
            for number, (qid, item) in enumerate(zip(query_set.qids, query_set.items, strict=True))
            if qid in found and item.get("text", "").isascii()
        ]
        step = max(1, len(printable) // _QUERIES)
        for number in printable[step // 2 :: step][:_QUERIES]:
            query = query_set.items[number]
            cells = [thumbnail(query.get("image"), query.get("text"), f"task {query_set.task}")]
            for row in found[query_set.qids[number]][:_DOCUMENTS]:
                if row < 0:  # beyond the end of a small pool
                    continue
                document = selection.document(row)
                right = row in query_set.relevant[number]
                label, color = ("found", "green") if right else ("other", "darkred")
                cells.append(thumbnail(document.get("image"), document.get("text"), label, color))
            rows.append(cells)
    width, height = THUMBNAIL_SIZE
    sheet = Image.new("RGB", ((1 + _DOCUMENTS) * width, len(rows) * height), "white")
    for number, cells in enumerate(rows):
        for place, picture in enumerate(cells):
            sheet.paste(picture, (place * width, number * height))
    return sheet
