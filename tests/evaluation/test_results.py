"""Files of results: read back as they were, of all three kinds, and refused in one line."""

import copy
import json
import random

import pytest

from puma_jax.errors import DataError
from puma_jax.evaluation.report import Evaluation, LeftOut, SetResult
from puma_jax.evaluation.results import compare, differing, read_evaluation, read_evaluations


def evaluation(rate=0.5, queries=20, name="cirr", split="test"):
    found = SetResult(
        name=name,
        task=7,
        queries=queries,
        documents=30,
        k=5,
        hits={"local": {1: rate / 4, 5: rate}, "global": {1: 0.0, 5: rate / 2}},
        interval={"local": (0.1, 0.9), "global": (0.0, 1.0)},
        wrong_modality={1: 0.25, 5: 0.5},
        left_out=LeftOut(unjudged_queries=1, missing_documents=2),
    )
    return Evaluation(split, 99, (found,), skipped=1, skipped_messages=("a:1: bad",))


def written(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def test_the_three_kinds_of_files_are_read(tmp_path):
    one, two = evaluation(0.5), evaluation(0.25)
    stages = {
        "first": {"layers": 2, "evaluation": one.to_json()},
        "second": {"layers": 1, "evaluation": two.to_json()},
        "third": {"layers": 1, "evaluation": None},
    }
    of_model = written(tmp_path / "a.json", {"model": "x", "benchmark": "y", **one.to_json()})
    of_stage = written(tmp_path / "b.json", stages["second"])
    of_run = written(tmp_path / "c.json", {"config": {}, "stages": stages})
    assert read_evaluations(of_model) == {"": one}
    assert read_evaluations(of_stage) == {"": two}
    assert read_evaluations(of_run) == {"first": one, "second": two}
    assert (read_evaluation(of_model), read_evaluation(of_stage)) == (one, two)
    with pytest.raises(DataError, match="holds the results of stages first, second: give the"):
        read_evaluation(of_run)
    with pytest.raises(DataError, match="holds no evaluation: its run had no queries"):
        read_evaluations(written(tmp_path / "d.json", stages["third"]))


def test_results_of_before_what_is_left_out_was_counted_are_read():
    values = evaluation().to_json()
    for name in ("skipped", "skipped_messages", "unused_files"):
        del values[name]
    del values["sets"][0]["left_out"]
    found = Evaluation.from_json(values)
    assert found.sets[0].hits == evaluation().sets[0].hits
    assert found.notes() == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: values.clear(), "it has no sets"),
        (lambda values: values.update(sets=[]), "sets is empty, expected at least one"),
        (lambda values: values.update(sets=values["sets"] * 2), "sets holds one set twice"),
        (lambda values: values["sets"][0].update(task=5), "task 5 is not one of 0, 1, 2, 3"),
        (lambda values: values["sets"][0].update(k=10), "hits.local has k .1, 5., expected 10"),
        (lambda values: values["sets"][0]["hits"].pop("global"), "hits has pools"),
        (lambda values: values["sets"][0]["hits"]["local"].update({"5": 1.5}), "must be in .0, 1"),
        (lambda values: values["sets"][0]["hits"]["local"].update({"five": 0.5}), "whole number"),
        (lambda values: values["sets"][0].update(queries=0), "queries 0 must be in .1, "),
        (lambda values: values["sets"][0]["hits"]["local"].update({"5": 0.25}), "was changed"),
        (lambda values: values.update(unknown=1), "unknown is unknown, expected split"),
    ],
)
def test_what_is_no_evaluation_is_refused_with_what_is_wrong(tmp_path, spoil, message):
    values = evaluation().to_json()
    spoil(values)
    path = written(tmp_path / "results.json", values)
    with pytest.raises(DataError, match=message) as error:
        read_evaluations(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


JUNK = [None, True, -1, 0, 7, 1.5, 1e308, 10**30, "", "x", "5", [], [1], {}, {"a": 1}]


def places(value, at=()):
    """The path to every value in a JSON value."""
    yield at
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(entry, (*at, key))


def mutated(values, chance):
    """A JSON value with one change somewhere."""
    values = copy.deepcopy(values)
    *parents, key = chance.choice([place for place in places(values) if place])
    holder = values
    for step in parents:
        holder = holder[step]
    kind = chance.randrange(3)
    if kind == 0:
        holder[key] = chance.choice(JUNK)
    elif kind == 1:
        del holder[key]
    elif isinstance(holder, dict):
        holder[chance.choice(["", "0", "x", "-1", "99"])] = chance.choice(JUNK)
    else:
        holder.append(chance.choice(JUNK))
    return values


def test_two_hundred_damaged_files_are_read_or_refused_in_a_line(tmp_path):
    chance = random.Random(0)
    whole = evaluation()
    kinds = [whole.to_json(), {"stages": {"one": {"evaluation": whole.to_json()}}}]
    messages = []
    for number in range(240):
        values = mutated(kinds[number % 2], chance)
        text = json.dumps(values)
        if number % 6 == 0:  # a bit of the file
            content = bytearray(text.encode())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            content = text.encode()
        path = tmp_path / "results.json"
        path.write_bytes(content)
        try:
            found = read_evaluations(path)
        except DataError as error:
            messages.append(str(error))
            continue
        for one in found.values():
            assert one.table()
            assert one.notes() is not None
        assert compare(found)
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


def test_numbers_of_other_queries_or_pools_are_told_apart():
    same = {"a": evaluation(0.5), "b": evaluation(0.25)}
    assert differing(same) == []
    assert differing({**same, "c": evaluation(0.25, queries=7, split="val")}) == [
        "cirr task 7  it → i differs in what was measured: 20 queries of test in 30 of 99 "
        "documents at 5 (a, b); 7 queries of val in 30 of 99 documents at 5 (c)"
    ]
