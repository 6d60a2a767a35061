"""A page that shows an evaluation: its table, its curves, and what queries found, with pictures.

The page is one HTML file: thumbnails and styles are in it, and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from puma_jax.data.decode import DecodeError
from puma_jax.data.mbeir import TASKS, modality_code
from puma_jax.data.thumbnails import thumbnail_uri
from puma_jax.evaluation.report import POOLS, Evaluation, SetResult
from puma_jax.evaluation.selection import QuerySet, Selection

_QUERIES = 3  # of each set
_DOCUMENTS = 5  # of each query and pool
_SIDE = 120  # of a thumbnail, in pixels
_TEXT = 160  # characters of a text that are shown

_LEGEND = (
    '<p class="legend"><span><i class="right"></i>relevant</span>'
    '<span><i class="wrong"></i>not relevant</span>'
    '<span><i class="kind"></i>of another modality than the task asks for</span></p>'
)


def page(title: str, sections: Iterable[str]) -> str:
    """Return a whole page.

    Args:
        title: Plain text.
        sections: HTML, in the order they are shown.
    """
    style = files("puma_jax.evaluation").joinpath("report.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n"
        f"<h1>{escape(title)}</h1>\n{''.join(sections)}</html>\n"
    )


def table(markdown: str) -> str:
    """Return a table of `report.markdown` as HTML."""
    header, _, *rows = (
        [cell.strip() for cell in line.strip("| ").split("|")] for line in markdown.splitlines()
    )

    def row(cells: Sequence[str], kind: str) -> str:
        name = ' class="mean"' if cells[0].startswith("mean of ") else ""
        return f"<tr{name}>{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in cells)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return (
        f'<div class="scroll"><table><thead>{row(header, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def evaluation_sections(selection: Selection, evaluation: Evaluation) -> Iterator[str]:
    """Yield the sections of an evaluation: its numbers, and what queries found.

    Args:
        selection: Selection that was evaluated.
        evaluation: Its evaluation, with runs.
    """
    yield "<h2>Hit rates</h2>\n"
    yield (
        "<p>Percentage of queries with a relevant document among the first k, in the pool of their "
        "own set and in the pool of all sets, ± half of the 95&nbsp;% interval. The last column is "
        "the percentage of queries whose first document is of another modality than their task "
        "asks for.</p>\n"
    )
    yield table(evaluation.table())
    yield "".join(f'<p class="quiet">{escape(note)}</p>\n' for note in evaluation.notes())
    yield "<h2>What queries found</h2>\n"
    yield (
        f"<p>{_QUERIES} queries of each set, evenly spaced and not chosen by their results, with "
        f"the first {_DOCUMENTS} documents of both pools.</p>\n{_LEGEND}\n"
    )
    for query_set, result in zip(selection.sets, evaluation.sets, strict=True):
        yield from _set_section(selection, query_set, result)


def reranked_section(evaluation: Evaluation, reranker: str, rerank_top: int) -> Iterator[str]:
    """Yield the section of an evaluation whose first documents a reranker ordered anew."""
    yield f"<h2>Hit rates after reranking</h2>\n<p>The first {rerank_top} documents of each query "
    yield f"and pool, ordered by {escape(reranker)}.</p>\n{table(evaluation.table())}"


def _set_section(selection: Selection, query_set: QuerySet, result: SetResult) -> Iterator[str]:
    rates = ", ".join(f"{pool} {100 * result.hits[pool][result.k]:.1f}" for pool in POOLS)
    yield f"<h3>{escape(result.title)} · hit@{result.k} {rates}</h3>\n"
    found = {pool: result.runs[pool] for pool in POOLS}
    places = {qid: place for place, qid in enumerate(found["local"].qids)}
    numbers = [number for number, qid in enumerate(query_set.qids) if qid in places]
    step = max(1, len(numbers) // _QUERIES)
    yield '<div class="scroll"><div class="found"><b>Query</b>'
    yield "<b>Local pool</b><i></i><b>Global pool</b>"
    wanted = modality_code(TASKS[query_set.task][1])
    for number in numbers[step // 2 :: step][:_QUERIES]:
        query = query_set.items[number]
        # Without its instruction, which many queries share.
        yield _item(query.get("image"), query.get("text"), "query")
        for pool in POOLS:
            yield "<i></i>" if pool == "global" else ""
            rows = found[pool].rows[places[query_set.qids[number]]].tolist()
            for row in (*rows, *[-1] * _DOCUMENTS)[:_DOCUMENTS]:
                if row < 0:  # beyond the end of a small pool
                    yield "<span></span>"
                    continue
                document = selection.document(row)
                kind = "wrong" if selection.modalities[row] == wanted else "kind"
                kind = "right" if row in query_set.relevant[number] else kind
                yield _item(document.get("image"), document.get("text"), kind)
    yield "</div></div>\n"


def _item(image: Any, text: str | None, kind: str) -> str:
    picture = "" if image is None else _thumbnail(Path(image))
    words = text or ""
    shown = words if len(words) <= _TEXT else f"{words[:_TEXT]}…"
    return f'<div class="item {kind}" title="{escape(words)}">{picture}<p>{escape(shown)}</p></div>'


def _thumbnail(path: Path) -> str:
    """Return an img element that holds a small picture; a word where it cannot be read."""
    try:
        return f'<img alt="" src="{thumbnail_uri(path, _SIDE)}">'
    except DecodeError:
        return "<p>image cannot be read</p>"
