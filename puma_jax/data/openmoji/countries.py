"""Facts about the countries with flags, as clues, questions, sentences and fact sheets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from puma_jax.data.demo.packages import demo_package
from puma_jax.data.openmoji.emoji_codes import country_code
from puma_jax.data.openmoji.names import Names


@dataclass(frozen=True, slots=True)
class Fact:
    """A kind of fact, such as "capital"; a clue is the kind and a value, "capital Paris"."""

    kind: str
    questions: tuple[str, ...]
    sentence: str
    """Format string with fields for the country and the value."""


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
"""Every kind of fact."""

_ON_SHEET = ("capital", "currency", "language", "region")


@dataclass(frozen=True, slots=True)
class Country:
    """A country with a flag."""

    code: str
    """Two-letter code of ISO 3166."""
    stem: str
    """Stem of the drawing of its flag."""
    name: str
    """English name of the flag's drawing."""
    facts: Mapping[str, tuple[str, ...]]
    """Values of each kind of fact; kinds without a value are left out."""
    neighbors: tuple[str, ...]
    """Codes of the countries that share a border with it, ascending."""

    @property
    def sheet(self) -> str:
        """The facts of the country on one line.

        "France: capital Paris, currency EUR, language fr, region Western Europe"
        """
        known = [f"{kind} {self.value(kind)}" for kind in _ON_SHEET if kind in self.facts]
        return f"{self.name}: {', '.join(known)}"

    def value(self, kind: str) -> str:
        """Return all values of a fact, joined: "nl, fr, de"."""
        return ", ".join(self.facts[kind])

    def sentence(self, fact: Fact) -> str:
        """Return the sentence that answers the questions of a fact."""
        return fact.sentence.format(self.name, self.value(fact.kind))


def clue(kind: str, value: str) -> str:
    """Return a clue to a country: "capital Paris"."""
    return f"{kind} {value}"


def load_countries(names: Mapping[str, Names]) -> dict[str, Country]:
    """Return the countries that have a flag and a capital, by code, ascending.

    Args:
        names: Names of the drawings, by stem; countries whose flags are missing are left out.

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
            continue  # a flag of a union, or of islands that are not a country
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
            # A border that only one side lists is a mistake of one of them.
            neighbors=tuple(sorted(other for other in listed[code] if code in listed[other])),
        )
        for code, (stem, data) in sorted(found.items())
    }


def _facts(data: Mapping) -> dict[str, tuple[str, ...]]:
    """Return the facts in a record of countryinfo, without empty values."""
    domains = [domain for domain in data.get("tld") or () if domain.isascii()]
    phones = [f"+{code}" for code in data.get("callingCodes") or () if code]
    # One record in twelve spells the region differently from the others.
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
