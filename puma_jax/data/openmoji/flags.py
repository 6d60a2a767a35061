"""Queries of tasks 2, 6 and 8: facts find a country, a flag finds facts and neighbors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations

from puma_jax.data.demo.drafts import Draft
from puma_jax.data.demo.split import hash_order, hold_out
from puma_jax.data.openmoji.catalogue import Documents, color_path
from puma_jax.data.openmoji.countries import FACTS, Country, clue

_MAX_ANSWERS = 3  # a pair of facts that more countries share is too vague a query


def facts_task(
    countries: Mapping[str, Country], documents: Documents, seed: int
) -> Iterator[Draft]:
    """Yield the queries of task 2: two facts find the flags and fact sheets of their countries.

    Pairs of facts are held out; training shows each of the two in another pair.
    """
    known = {
        code: {clue(kind, value) for kind, values in country.facts.items() for value in values}
        for code, country in countries.items()
    }
    answers: dict[tuple[str, str], list[str]] = {}
    for country in countries.values():
        # A query uses the first value of a kind; any value answers: Belgium speaks French, too.
        clues = [clue(kind, values[0]) for kind, values in country.facts.items()]
        for pair in combinations(clues, 2):
            answers[pair] = [code for code in countries if known[code].issuperset(pair)]
    few = {pair: codes for pair, codes in answers.items() if len(codes) <= _MAX_ANSWERS}
    parts = {pair: (*pair, f"{codes[0]}:sheet") for pair, codes in few.items()}
    splits = hold_out(parts, seed, "facts", test=0.15, val=0.08)
    for pair, codes in few.items():
        yield Draft(
            task=2,
            split=splits[pair],
            text=", ".join(pair),
            image=None,
            positives=tuple(documents.sheets[code].did for code in codes),
            parts=frozenset(parts[pair]),
        )


def question_task(
    countries: Mapping[str, Country],
    appearances: Mapping[str, str],
    documents: Documents,
    seed: int,
) -> Iterator[Draft]:
    """Yield the queries of task 6: a flag and a question find the sentence that answers it.

    Pairs of flag and question are held out; training shows the flag with other questions and the
    question with other flags. Two countries with the same flag give two relevant documents.

    Args:
        countries: Countries, by code.
        appearances: Stem of the first drawing that looks the same, by stem.
        documents: Documents of the pools.
        seed: Seed of the random choices.
    """
    answers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for country in countries.values():
        for kind in country.facts:
            did = documents.sentences[country.code, kind].did
            answers[appearances[country.stem], kind].append(did)
    parts = {pair: (f"{pair[0]}:flag", f"question:{pair[1]}") for pair in answers}
    splits = hold_out(parts, seed, "questions", test=0.15, val=0.08)
    for fact in FACTS:
        for appearance in dict.fromkeys(
            appearances[country.stem] for country in countries.values()
        ):
            pair = appearance, fact.kind
            if pair not in answers:
                continue
            wordings = hash_order(fact.questions, seed, f"wording of {pair}")
            for question in wordings if splits[pair] == "train" else wordings[:1]:
                yield Draft(
                    task=6,
                    split=splits[pair],
                    text=question,
                    image=color_path(appearance),
                    positives=tuple(answers[pair]),
                    parts=frozenset(parts[pair]),
                )


def neighbor_task(
    countries: Mapping[str, Country],
    appearances: Mapping[str, str],
    documents: Documents,
    seed: int,
) -> Iterator[Draft]:
    """Yield the queries of task 8: a flag and a clue find the one neighbor the clue is true of.

    Borders are held out in both directions; training shows both countries with other neighbors.

    Args:
        countries: Countries, by code.
        appearances: Stem of the first drawing that looks the same, by stem.
        documents: Documents of the pools.
        seed: Seed of the random choices.
    """
    borders = {
        (code, other): (f"{code}:border", f"{other}:border")
        for code, country in countries.items()
        for other in country.neighbors
        if code < other
    }
    splits = hold_out(borders, seed, "borders", test=0.16, val=0.08)
    fitting: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for code, country in countries.items():
        for other in country.neighbors:
            for kind, values in countries[other].facts.items():
                for value in values:
                    fitting[appearances[country.stem], clue(kind, value)].add((code, other))
    for (appearance, hint), found in fitting.items():
        if len(found) > 1:
            continue
        code, other = next(iter(found))
        yield Draft(
            task=8,
            split=splits[min(code, other), max(code, other)],
            text=f"the neighbour with {hint}",
            image=color_path(appearance),
            positives=(documents.sheets[other].did,),
            parts=frozenset({f"{appearance}:flag", f"{other}:sheet", hint}),
        )
