"""The harness finds what it is for."""

import json

import pytest

from puma_jax.files import read_json
from tests.fuzz import Target, check_only_declared_errors, mutations

CONTENT = json.dumps({"name": "a", "layers": [1, 2], "inner": {"rate": 0.5}}).encode()


def test_the_same_seed_makes_the_same_damage():
    first = list(mutations(CONTENT, 1, 50))
    assert first == list(mutations(CONTENT, 1, 50)) != list(mutations(CONTENT, 2, 50))
    assert sum(content == CONTENT for content in first) < 5


def test_damaged_json_is_mostly_still_json():
    sound = 0
    for content in mutations(CONTENT, 0, 300):
        try:
            json.loads(content)
            sound += 1
        except (ValueError, RecursionError):
            pass
    assert 120 < sound < 270


def test_a_reader_of_declared_errors_passes(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(CONTENT)
    outcome = check_only_declared_errors(Target(path, lambda: read_json(path)))
    assert outcome.count == 200
    assert min(outcome.declared, outcome.accepted) > 20
    assert path.read_bytes() == CONTENT


def test_other_exceptions_and_unprintable_messages_are_found(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(CONTENT)

    def careless():
        return json.loads(path.read_bytes())["inner"]["rate"] + 1

    with pytest.raises(AssertionError, match="KeyError"):
        check_only_declared_errors(Target(path, careless))

    def unprintable():
        if path.read_bytes() != CONTENT:
            raise ValueError("two\nlines")

    with pytest.raises(AssertionError, match="not one printable line"):
        check_only_declared_errors(Target(path, unprintable, ValueError))
