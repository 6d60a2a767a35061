"""A page of search results: one HTML file, with its pictures in it."""

from __future__ import annotations

import html
from collections.abc import Sequence

from puma_jax.data.decode import DecodeError
from puma_jax.data.thumbnails import thumbnail_uri
from puma_jax.errors import printable
from puma_jax.search.index import Hit

_PIXELS = 640
"""Longer side of a picture: twice that of its place on the page, for fine screens."""
_STYLE = """
:root { color-scheme: light dark; --line: #d4d4d8; --soft: #71717a; --panel: #f4f4f5; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3f3f46; --soft: #a1a1aa; --panel: #27272a; } }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1.5rem; }
header { display: flex; gap: 1.25rem; align-items: center; margin-bottom: 1.5rem; }
header img { max-height: 8rem; max-width: 12rem; border-radius: .5rem; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
header p { color: var(--soft); margin: .25rem 0 0; }
ol { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr));
  list-style: none; margin: 0; padding: 0; }
li { border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }
li img, li .none { background: var(--panel); display: block; height: 12rem; object-fit: contain;
  width: 100%; }
li .none { align-content: center; color: var(--soft); text-align: center; }
li p { margin: .6rem .8rem; overflow-wrap: anywhere; }
li .text { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 6;
  overflow: hidden; }
li .about { color: var(--soft); font-size: .85rem; }
"""


def results_page(
    hits: Sequence[Hit],
    *,
    text: str | None = None,
    image: str | None = None,
    about: str = "",
) -> str:
    """Return a page of what a query found, which needs no other file and no network.

    Args:
        hits: What was found, best first.
        text: Text of the query.
        image: Path of the image of the query.
        about: One line below the query.
    """
    title = _escaped(text or "Documents like this image")
    query = f'<img src="{thumbnail_uri(image, _PIXELS)}" alt="image of the query">' if image else ""
    results = "\n".join(_result(rank, hit) for rank, hit in enumerate(hits, 1))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
<header>{query}<div><h1>{title}</h1><p>{_escaped(about)}</p></div></header>
<main>
<ol>
{results or "<li><p>Nothing was found.</p></li>"}
</ol>
</main>
</html>
"""


def _result(rank: int, hit: Hit) -> str:
    document = hit.document
    picture = _picture(document.image, document.id) if document.image else ""
    text = f'<p class="text">{_escaped(document.text)}</p>' if document.text else ""
    fields = "".join(
        f"<br>{_escaped(name)}: {_escaped(str(value))}" for name, value in document.fields.items()
    )
    about = f"{rank}. <b>{hit.score:.3f}</b> · {_escaped(document.id)}{fields}"
    return f'<li>{picture}{text}<p class="about">{about}</p></li>'


def _picture(path: str, name: str) -> str:
    try:
        return f'<img src="{thumbnail_uri(path, _PIXELS)}" alt="{_escaped(name)}" loading="lazy">'
    except DecodeError:
        return '<p class="none">The image cannot be read.</p>'


def _escaped(text: str) -> str:
    return html.escape(printable(text))
