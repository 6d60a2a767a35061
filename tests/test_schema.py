"""Settings and files are held to what their dataclasses declare."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from puma_jax.errors import ConfigError
from puma_jax.schema import Count, Fraction, Positive, Range, check, from_json


@dataclass(frozen=True)
class Inner:
    rate: Positive = 1.0

    def __post_init__(self) -> None:
        check(self, "inner")


@dataclass(frozen=True)
class Outer:
    name: str
    size: Count = 1
    share: Fraction | None = None
    kind: Literal["a", "b"] = "a"
    path: Path | None = None
    pairs: tuple[tuple[str, float], ...] = ()
    window: tuple[int, int] | None = None
    inner: Inner = Inner()
    by_name: dict[str, Inner] = field(default_factory=dict)
    anything: Any = None
    flag: bool = False


def test_an_object_becomes_what_its_dataclass_says():
    found = from_json(
        Outer,
        {
            "name": "x",
            "size": 3,
            "share": 1,
            "kind": "b",
            "path": "a/b",
            "pairs": [["p", 1], ["q", 0.5]],
            "window": [1, 2],
            "inner": {"rate": 2},
            "by_name": {"one": {"rate": 3}},
            "anything": [1, {"2": 3}],
            "flag": True,
        },
    )
    assert found == Outer(
        name="x",
        size=3,
        share=1.0,
        kind="b",
        path=Path("a/b"),
        pairs=(("p", 1.0), ("q", 0.5)),
        window=(1, 2),
        inner=Inner(2.0),
        by_name={"one": Inner(3.0)},
        anything=[1, {"2": 3}],
        flag=True,
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "name is missing"),
        ({"name": 3}, "name 3 is not a text"),
        ({"name": "x", "nmae": 1}, "nmae is unknown, expected name, size, "),
        ({"name": "x", "size": 0}, "size 0 must be in [1, "),
        ({"name": "x", "size": True}, "size true is not a whole number"),
        ({"name": "x", "size": 1.0}, "size 1.0 is not a whole number"),
        ({"name": "x", "size": 10**30}, "must be in [1, "),
        ({"name": "x", "share": 1.5}, "share 1.5 must be in [0, 1]"),
        ({"name": "x", "share": "1"}, 'share "1" is not a number'),
        ({"name": "x", "kind": "c"}, 'kind "c" is not one of a, b'),
        ({"name": "x", "kind": ["a"]}, "is not one of a, b"),
        ({"name": "x", "window": [1]}, "window [1] is not a list of 2"),
        ({"name": "x", "window": [1, "2"]}, 'window[1] "2" is not a whole number'),
        ({"name": "x", "inner": {"rate": 0}}, "inner.rate 0.0 must be above 0"),
        ({"name": "x", "inner": None}, "inner null is not an object"),
        ({"name": "x", "by_name": {"one": {"rate": "y"}}}, 'by_name.one.rate "y" is not a number'),
        ({"name": "x", "flag": 1}, "flag 1 is not true or false"),
        ([], "value [] is not an object"),
        ({"name": "x", "inner": {"rate": 10**400}}, "is not a finite number"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(value: object, message: str):
    with pytest.raises(ConfigError) as error:
        from_json(Outer, value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_fields_can_be_ignored():
    assert from_json(Outer, {"name": "x", "other": 1}, unknown="ignore") == Outer("x")


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf, "1", None])
def test_a_config_with_nonsense_cannot_be_made(rate: object):
    with pytest.raises(ConfigError, match=r"inner\.rate"):
        Inner(rate)


@dataclass(frozen=True)
class Open:
    share: Annotated[float, Range(0, 1, open_low=True, open_high=True)]


def test_open_ends_of_a_range_are_outside():
    assert from_json(Open, {"share": 0.5}) == Open(0.5)
    for end in (0, 1):
        with pytest.raises(ConfigError, match=r"share [01]\.0 must be in \(0, 1\)"):
            from_json(Open, {"share": end})
