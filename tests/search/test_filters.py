"""Filters say what Milvus' own do, and what cannot be read is named with its place."""

import pytest

from puma_jax.errors import SearchError
from puma_jax.search.filters import parse_filter

DOCUMENTS = {
    "shoes/1": {"price": 12, "color": "red", "sizes": ["S", "M"], "sold": True},
    "shoes/2": {"price": 20.5, "color": "blue\n", "sizes": [], "sold": False},
    "hats/3": {"price": "unknown", "color": 'a "deep" red'},
    "hats/4": {"unit price": 1, "Größe": 3, "color": "100%"},
}
FILTERS = {
    "price < 20": "1",
    "price <= 12 or price >= 20.5": "12",
    "price == 12.0": "1",
    'price != 12 and color != "red"': "23",
    "not price == 12": "23",
    "price in [12, 20.5]": "12",
    "price not in [12, 20.5]": "3",
    'price in ["unknown", 12]': "13",
    'color like "%red"': "13",
    'color like "blue_"': "2",
    'color like "100%"': "4",
    'not (color like "%red")': "24",
    "color == 'a \"deep\" red'": "3",
    'color == "a \\"deep\\" red"': "3",
    'color == "blue\\n"': "2",
    "sold == true": "1",
    "sold != true": "2",
    "sold == false && price > 1": "2",
    "SOLD == true": "",
    'json_contains(sizes, "S")': "1",
    'NOT ARRAY_CONTAINS(sizes, "S")': "2",
    'id like "hats/%"': "34",
    'id in ["hats/3", "nothing"] || id == "shoes/1"': "13",
    'fields["unit price"] == 1': "4",
    "Größe >= -3": "4",
    "not (price < 20 or sold == true)": "2",
    "!(price < 20 and sold == true)": "2",
    "not price < 20": "2",
    "not (sold != true or price > 15)": "1",
    "not id == 'hats/3' and not id in ['hats/4']": "12",
    "price < 20 or sold == false and price > 30": "1",
    "(price < 20 or sold == false) and price > 30": "",
    "((price<20))": "1",
}


@pytest.mark.parametrize("text", FILTERS)
def test_a_filter_finds_what_it_says(text):
    found = parse_filter(text)
    matching = [name for name, fields in DOCUMENTS.items() if found.matches(name, fields)]
    assert "".join(name[-1] for name in matching) == FILTERS[text]


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("", 1, "found the end, expected the name of a field"),
        ("price", 6, "found the end, expected one of == !="),
        ("price = 3", 7, 'found "=", expected a name, a value or a sign'),
        ("price < ", 9, "found the end, expected a number"),
        ("price < color", 9, 'found "color", expected a number'),
        ("20 > price", 1, 'found "20", expected the name'),
        ("1 < price < 3", 1, 'found "1"'),
        ("price < 3 < 4", 11, "expected and, or, or the end"),
        ("price in []", 11, 'found "]"'),
        ("price in 3", 10, r"expected \["),
        ("(price < 3", 11, r"expected \)"),
        ("price < true", 9, "expected a number or a text"),
        ("price == 1e999", 10, "expected a number of 64 bits"),
        ("price == 99999999999999999999", 10, "expected a number of 64 bits"),
        ('color like "a\\\\%"', 12, "without backslashes"),
        ('color == "\\x41"', 10, "behind a backslash"),
        ("id == 3", 7, "a text in quotation marks, as ids are texts"),
        ('id in ["3", 3]', 13, "a text in quotation marks"),
        ('json_contains(id, "a")', 15, "which id is not"),
        ('color == "open', 10, "expected a name"),
        ("price == 3; drop", 11, 'found ";"'),
        ("__import__('os')", 11, r'found "\("'),
        ("(" * 200, 51, "at most 50 levels"),
        ("not " * 200, 201, "at most 50 levels"),
    ],
)
def test_what_is_no_filter_is_named_with_its_place(text, column, said):
    with pytest.raises(SearchError, match=f"column {column}: .*{said}") as error:
        parse_filter(text)
    assert "\n" not in str(error.value)


def test_a_filter_that_is_too_long_is_refused():
    with pytest.raises(SearchError, match="characters, at most"):
        parse_filter("price < 3 or " * 10_000 + "price < 3")
