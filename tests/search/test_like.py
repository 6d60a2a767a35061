"""`like` in filters finds what fnmatch finds, and no pattern is hard to match."""

import fnmatch
import random

from puma_jax.search.filters import parse_filter


def finds(pattern: str, text: str) -> bool:
    return parse_filter(f'name like "{pattern}"').matches("id", {"name": text})


def test_like_finds_what_fnmatch_finds():
    rng = random.Random(0)
    found = 0
    for _ in range(5000):
        pattern = "".join(rng.choices("ab_%", k=rng.randrange(8)))
        text = "".join(rng.choices("ab\n", [5, 5, 1], k=rng.randrange(9)))
        glob = pattern.replace("%", "*").replace("_", "?")
        assert finds(pattern, text) == fnmatch.fnmatchcase(text, glob), (pattern, text)
        found += finds(pattern, text)
    assert found > 500


def test_a_pattern_of_many_parts_is_answered_at_once():
    """With plain ".*" between the parts, this would take longer than anyone lives."""
    assert not finds("%a" * 1000 + "%b", "a" * 2000)
    assert finds("%a" * 1000 + "%", "a" * 2000)
