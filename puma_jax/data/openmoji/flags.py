"""Tasks 2, 6 and 8: countries found by facts, asked by their flags, sought among neighbours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations

from puma_jax.data.openmoji.catalogue import Documents, color_path
from puma_jax.data.openmoji.countries import FACTS, Country, clue
from puma_jax.data.openmoji.drafts import Draft
from puma_jax.data.openmoji.split import hold_out, in_lot_order

_MOST_ANSWERS = 3  # a pair of facts that more countries share asks for too little


def facts_task(
    countries: Mapping[str, Country], documents: Documents, seed: int
) -> Iterator[Draft]:
    """Yield the queries of task 2: two facts ask for the flag and fact sheet they are true of.

    Held out are pairs of facts; each of the two was seen in another pair.
    """
    known = {
        code: {clue(kind, value) for kind, values in country.facts.items() for value in values}
        for code, country in countries.items()
    }
    answers: dict[tuple[str, str], list[str]] = {}
    for country in countries.values():
        # One value of a kind asks; any value answers: Belgium speaks French, too.
        asked = [clue(kind, values[0]) for kind, values in country.facts.items()]
        for pair in combinations(asked, 2):
            answers[pair] = [code for code in countries if known[code].issuperset(pair)]
    few = {pair: codes for pair, codes in answers.items() if len(codes) <= _MOST_ANSWERS}
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
    countries: Mapping[str, Country], looks: Mapping[str, str], documents: Documents, seed: int
) -> Iterator[Draft]:
    """Yield the queries of task 6: a flag with a question asks for the sentence that answers it.

    Held out are pairs of flag and question; the flag was seen with other questions, the question
    with other flags. Two countries under the same flag have two right answers.

    Args:
        countries: By code.
        looks: Stem of the first drawing that looks the same, by stem.
        documents: What can be found.
        seed: Of the lots.
    """
    answers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for country in countries.values():
        for kind in country.facts:
            did = documents.sentences[country.code, kind].did
            answers[looks[country.stem], kind].append(did)
    parts = {pair: (f"{pair[0]}:flag", f"question:{pair[1]}") for pair in answers}
    splits = hold_out(parts, seed, "questions", test=0.15, val=0.08)
    for fact in FACTS:
        for look in dict.fromkeys(looks[country.stem] for country in countries.values()):
            pair = look, fact.kind
            if pair not in answers:
                continue
            wordings = in_lot_order(fact.questions, seed, f"wording of {pair}")
            for question in wordings if splits[pair] == "train" else wordings[:1]:
                yield Draft(
                    task=6,
                    split=splits[pair],
                    text=question,
                    image=color_path(look),
                    positives=tuple(answers[pair]),
                    parts=frozenset(parts[pair]),
                )


def neighbour_task(
    countries: Mapping[str, Country], looks: Mapping[str, str], documents: Documents, seed: int
) -> Iterator[Draft]:
    """Yield the queries of task 8: a flag and a clue ask for the one neighbour it is true of.

    Held out are borders, in both directions; both countries were seen with other neighbours.

    Args:
        countries: By code.
        looks: Stem of the first drawing that looks the same, by stem.
        documents: What can be found.
        seed: Of the lots.
    """
    borders = {
        (code, other): (f"{code}:border", f"{other}:border")
        for code, country in countries.items()
        for other in country.neighbours
        if code < other
    }
    splits = hold_out(borders, seed, "borders", test=0.16, val=0.08)
    fitting: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for code, country in countries.items():
        for other in country.neighbours:
            for kind, values in countries[other].facts.items():
                for value in values:
                    fitting[looks[country.stem], clue(kind, value)].add((code, other))
    for (look, hint), found in fitting.items():
        if len(found) > 1:
            continue
        code, other = next(iter(found))
        yield Draft(
            task=8,
            split=splits[min(code, other), max(code, other)],
            text=f"the neighbour with {hint}",
            image=color_path(look),
            positives=(documents.sheets[other].did,),
            parts=frozenset({f"{look}:flag", f"{other}:sheet", hint}),
        )
