"""What a model found, to look at: queries of every set beside the documents that came first."""

from __future__ import annotations

from PIL import Image

from puma_jax.data.sheet import CELL, cell
from puma_jax.retrieval.report import Evaluation, Pool
from puma_jax.retrieval.selection import Selection

_QUERIES = 3  # of each set
_FOUND = 5  # of each query


def retrieved(selection: Selection, evaluation: Evaluation, pool: Pool = "global") -> Image.Image:
    """Return a sheet with a query in each row and what it found behind it; green answers it.

    Queries are taken at equal distances among those of a set, in ASCII, for the font's sake.

    Args:
        selection: What was evaluated.
        evaluation: With its runs.
        pool: Where documents were looked for.
    """
    rows = []
    row_of = {did: row for row, did in enumerate(selection.dids)}
    for asked, result in zip(selection.sets, evaluation.sets, strict=True):
        run = result.runs[pool]
        printable = [n for n, item in enumerate(asked.items) if item.get("text", "").isascii()]
        step = max(1, len(printable) // _QUERIES)
        for number in printable[step // 2 :: step][:_QUERIES]:
            query = asked.items[number]
            # The instruction, on the first line, is the same for many.
            text = query.get("text", "").partition("\n")[2]
            cells = [cell(query.get("image"), text, f"task {asked.task}")]
            for did in run.dids[number][:_FOUND]:
                if did is None:
                    continue
                document = selection.document(row_of[did])
                right = row_of[did] in asked.relevant[number]
                mark, colour = ("found", "green") if right else ("other", "darkred")
                cells.append(cell(document.get("image"), document.get("text"), mark, colour))
            rows.append(cells)
    width, height = CELL
    sheet = Image.new("RGB", ((1 + _FOUND) * width, len(rows) * height), "white")
    for number, cells in enumerate(rows):
        for place, one in enumerate(cells):
            sheet.paste(one, (place * width, number * height))
    return sheet
