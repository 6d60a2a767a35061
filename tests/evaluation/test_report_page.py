"""The page of an evaluation shows what queries found, holds all it needs, and trusts no text."""

import re
from html.parser import HTMLParser

from puma_jax.data import mbeir
from puma_jax.evaluation.charts import line_chart
from puma_jax.evaluation.evaluation import evaluate_selection
from puma_jax.evaluation.report_page import evaluation_sections, page, table
from puma_jax.evaluation.selection import select
from tests.evaluation.small import document, encode, write_set

HOSTILE = "<script>alert('x')</script> & \"quotes\""


class Items(HTMLParser):
    """Classes and titles of the items of a page."""

    def __init__(self, text):
        super().__init__()
        self.items, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        if attrs.get("class", "").startswith("item "):
            self.items.append((attrs["class"].split()[1], attrs["title"]))


def shown(tmp_path, queries, documents):
    write_set(tmp_path, "mine", 1, queries, documents)
    selection = select(mbeir.discover(tmp_path))
    evaluation = evaluate_selection(selection, encode, progress=False)
    return page(HOSTILE, evaluation_sections(selection, evaluation))


def test_relevant_documents_are_marked_in_both_pools(tmp_path):
    text = shown(
        tmp_path,
        {"q:0": ("a red bicycle", ["d:0"])},
        [document("d:0", text="red bicycle"), document("d:1", text=HOSTILE)],
    )
    found = [("right", "red bicycle"), ("wrong", HOSTILE)]
    assert Items(text).items == [("query", "a red bicycle"), *found, *found]


def test_a_page_fetches_nothing_and_runs_nothing(tmp_path):
    documents = [document("d:0", text="red"), document("d:1", text=HOSTILE)]
    text = shown(tmp_path, {"q:0": (HOSTILE, ["d:0"])}, documents)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "script" not in Items(text).tags
    assert f"<title>{HOSTILE}" not in text


def test_every_number_of_a_table_is_there(tmp_path):
    rows = table("| set | hits |\n|-----|-----:|\n| a | 1.0 |\n| mean of 2 | 2.0 |")
    assert re.findall(r"<td>([^<]*)</td>", rows) == ["a", "1.0", "mean of 2", "2.0"]
    assert rows.count('class="mean"') == 1


def test_a_chart_places_its_points_by_value():
    chart = line_chart({"a & b": [(0, 1.0), (50, 3.0), (100, float("nan"))]}, x="step", y="loss")
    (points,) = re.findall(r'points="([^"]+)"', chart)
    (left, low), (right, high) = (map(float, point.split(",")) for point in points.split())
    assert left < right
    assert high < low  # SVG counts from the top
    assert "a &amp; b" in chart
    assert line_chart({"none": []}, x="step", y="loss") == ""
