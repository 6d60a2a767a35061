"""Facts of the countries whose flags are drawn, as clues, questions, sentences and fact sheets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from puma_jax.data.openmoji.names import Names
from puma_jax.data.openmoji.packages import demo_package
from puma_jax.data.openmoji.signs import country_code


@dataclass(frozen=True, slots=True)
class Fact:
    """A kind of fact: "capital"; its clue is the kind and a value, "capital Paris"."""

    kind: str
    questions: tuple[str, ...]
    sentence: str
    """With places for the country and the value."""


FACTS = (
    Fact("capital", ("Capital?", "What is its capital?"), "The capital of {} is {}."),
    Fact("currency", ("Currency?", "What money does it use?"), "The currency of {} is {}."),
    Fact("language", ("Languages?", "What is spoken there?"), "The languages of {} are {}."),
    Fact("region", ("Region?", "Where does it lie?"), "The region of {} is {}."),
    Fact("people", ("People?", "What are its people called?"), "The people of {} are {}."),
    Fact("domain", ("Domain?", "What do its web sites end in?"), "The domain of {} is {}."),
    Fact("phone", ("Phone code?", "How is it called by phone?"), "The phone code of {} is {}."),
    Fact("code", ("ISO code?", "What is its three-letter code?"), "The ISO code of {} is {}."),
)
"""What can be asked of a country."""

_ON_SHEET = ("capital", "currency", "language", "region")


@dataclass(frozen=True, slots=True)
class Country:
    """A country with a flag."""

    code: str
    """Two letters, ISO 3166."""
    stem: str
    """Of the drawing of its flag."""
    name: str
    """As the flag's drawing is called in English."""
    facts: Mapping[str, tuple[str, ...]]
    """The values of each kind of fact; a kind of which nothing is known is left out."""
    neighbours: tuple[str, ...]
    """Codes of the countries that share a border with it, in order."""

    @property
    def sheet(self) -> str:
        """What is known of the country, in a line.

        "France: capital Paris, currency EUR, language fr, region Western Europe"
        """
        known = [f"{kind} {self.value(kind)}" for kind in _ON_SHEET if kind in self.facts]
        return f"{self.name}: {', '.join(known)}"

    def value(self, kind: str) -> str:
        """Return all values of a fact in one text: "nl, fr, de"."""
        return ", ".join(self.facts[kind])

    def sentence(self, fact: Fact) -> str:
        """Return the sentence that answers the questions of a fact."""
        return fact.sentence.format(self.name, self.value(fact.kind))


def clue(kind: str, value: str) -> str:
    """Return the words by which a country may be known: "capital Paris"."""
    return f"{kind} {value}"


def load_countries(names: Mapping[str, Names]) -> dict[str, Country]:
    """Return the countries that have both a flag and a capital, by their codes, in order.

    Args:
        names: Of the drawings, by their stems; a country whose flag is not there is left out.

    Raises:
        ConfigError: The demo packages are not installed.
    """
    package = demo_package("countryinfo")
    found = {}
    for stem in names:
        code = country_code(stem)
        try:
            data = package.CountryInfo(code).info() if code else {}
        except package.CountryNotFoundError:
            continue  # flags of unions and of islands that are no country
        if code and data.get("capital"):
            found[code] = (stem, data)
    codes = {data["ISO"]["alpha3"]: code for code, (_, data) in found.items()}
    listed = {
        code: {codes[border] for border in data.get("borders") or () if border in codes}
        for code, (_, data) in found.items()
    }
    return {
        code: Country(
            code=code,
            stem=stem,
            name=names[stem]["en"],
            facts=_facts(data),
            # Some borders are listed by one side only; those are mistakes of either side.
            neighbours=tuple(sorted(other for other in listed[code] if code in listed[other])),
        )
        for code, (stem, data) in sorted(found.items())
    }


def _facts(data: Mapping) -> dict[str, tuple[str, ...]]:
    """Return the facts of a record of countryinfo, without what is empty there."""
    domains = [domain for domain in data.get("tld") or () if domain.isascii()]
    phones = [f"+{code}" for code in data.get("callingCodes") or () if code]
    # One record in twelve writes the region otherwise than its neighbours do.
    region = (data.get("subregion") or "").replace("South-Eastern", "South-eastern")
    values: dict[str, Iterable[str | None]] = {
        "capital": [data.get("capital")],
        "currency": data.get("currencies") or (),
        "language": data.get("languages") or (),
        "region": [region],
        "people": [data.get("demonym")],
        "domain": domains[:1],
        "phone": phones[:1],
        "code": [data["ISO"]["alpha3"]],
    }
    stripped = {
        kind: tuple(value.strip() for value in listed if value and value.strip())
        for kind, listed in values.items()
    }
    return {kind: listed for kind, listed in stripped.items() if listed}
