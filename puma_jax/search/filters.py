"""Filters over the fields of documents: read once, then evaluated here or written for Milvus.

The language is the part of Milvus' that every store understands:

```
price < 20 and color == "red"          ==  !=  <  <=  >  >=
size in ["S", "M"] || not sold == true in  not in  and &&  or ||  not !
id like "shoes/%"                      like: % is any text, _ one character
json_contains(tags, "new")             a list holds a value
fields["unit price"] < 3               a name that is no identifier
```

Names are those of fields, and `id`. What is said of a field that a document lacks is unknown, and
so is its negation: the document is not found. So is whether a text is below a number. Values of
different types are unequal; true is 1 and false is 0.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from puma_jax.errors import SearchError
from puma_jax.schema import shown
from puma_jax.search.fields import Scalar

_MAX_CHARACTERS = 20_000
_MAX_DEPTH = 50
_LARGEST = 2**63 - 1
_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<number>-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?!\w))
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<name>[^\W\d]\w*)
      | (?P<sign>==|!=|<=|>=|&&|\|\||[<>!()\[\],])""",
    re.VERBOSE,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "'": "'", "\\": "\\"}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}
_WORDS = {"&&": "and", "||": "or", "!": "not"}
_CONTAINS = {"json_contains", "array_contains"}


@dataclass(frozen=True)
class Filter:
    """A filter that was read."""

    root: Node
    names: frozenset[str]
    """Fields that it names, without id."""

    def matches(self, identifier: str, fields: Mapping[str, Any]) -> bool:
        """Return whether a document is found."""
        return self.root.holds(identifier, fields) is True

    def milvus(self) -> str:
        """Return the filter in Milvus' language, over the columns `id` and `fields`."""
        return self.root.milvus(False)


@dataclass(frozen=True)
class Comparison:
    """A field compared with values: by a sign, `in`, `like` or `contains`."""

    name: str
    sign: str
    value: Scalar | tuple[Scalar, ...]

    def holds(self, identifier: str, fields: Mapping[str, Any]) -> bool | None:
        """Return whether it holds of a document; None if that is unknown."""
        found = identifier if self.name == "id" else fields.get(self.name)
        if found is None:
            return None
        if self.sign == "in":
            return not isinstance(found, list) and found in self.value  # type: ignore[operator]
        if self.sign == "like":
            return isinstance(found, str) and self._pattern.fullmatch(found) is not None
        if self.sign == "contains":
            return isinstance(found, list) and self.value in found
        try:
            return _COMPARE[self.sign](found, self.value)
        except TypeError:  # a text and a number
            return None

    def milvus(self, negated: bool) -> str:
        """Return it, or its negation, in Milvus' language."""
        path = "id" if self.name == "id" else f"fields[{_quoted(self.name)}]"
        opposite = _OPPOSITE.get(self.sign) if negated else None
        sign = opposite or self.sign
        if sign == "in":
            # Not Milvus' own "in": Lite takes it of columns alone, servers of one type alone.
            values = self.value if isinstance(self.value, tuple) else (self.value,)
            said = " or ".join(f"{path} == {_quoted(value)}" for value in values)
        elif sign == "contains":
            # With one value: Lite reads numbers below zero in lists alone.
            said = f"json_contains_any({path}, [{_quoted(self.value)}])"
        else:
            said = f"{path} {sign} {_quoted(self.value)}"
        inverted = negated and opposite is None
        if inverted:
            said = f"not ({said})"
        # Stores differ in what they make of a field that is missing in these two.
        guarded = self.name != "id" and (inverted or sign == "!=")
        return f"(exists {path} and {said})" if guarded else f"({said})"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        first, *rest = (
            "".join("." if character == "_" else re.escape(character) for character in part)
            for part in str(self.value).split("%")
        )
        if not rest:
            return re.compile(first, re.DOTALL)
        # Each part may take the first place it finds, and never another: the time stays linear in
        # the text for each part, where ".*" alone would try all ways to lay them out.
        between = "".join(f"(?>.*?{part})" for part in rest[:-1])
        return re.compile(f"{first}{between}.*{rest[-1]}", re.DOTALL)


@dataclass(frozen=True)
class Not:
    """The negation of a node."""

    node: Node

    def holds(self, identifier: str, fields: Mapping[str, Any]) -> bool | None:
        """Return whether it holds of a document; None if that is unknown."""
        found = self.node.holds(identifier, fields)
        return None if found is None else not found

    def milvus(self, negated: bool) -> str:
        """Return it, or its negation, in Milvus' language."""
        return self.node.milvus(not negated)


@dataclass(frozen=True)
class Joined:
    """Nodes of which all hold, or at least one."""

    word: Literal["and", "or"]
    nodes: tuple[Node, ...]

    def holds(self, identifier: str, fields: Mapping[str, Any]) -> bool | None:
        """Return whether it holds of a document; None if that is unknown."""
        found = [node.holds(identifier, fields) for node in self.nodes]
        decides = self.word == "or"
        if decides in found:
            return decides
        return None if None in found else not decides

    def milvus(self, negated: bool) -> str:
        """Return it, or its negation, in Milvus' language."""
        word = {"and": "or", "or": "and"}[self.word] if negated else self.word
        return f"({f' {word} '.join(node.milvus(negated) for node in self.nodes)})"


Node = Comparison | Not | Joined


def parse_filter(text: str) -> Filter:
    """Return the filter that a text says.

    >>> parse_filter('price < 20').milvus()
    '(fields["price"] < 20)'

    Raises:
        SearchError: The text is no filter; the message says where.
    """
    if len(text) > _MAX_CHARACTERS:
        raise SearchError(f"the filter has {len(text):,} characters, at most {_MAX_CHARACTERS:,}")
    parser = _Parser(text)
    return Filter(parser.whole(), frozenset(parser.names))


class _Token(NamedTuple):
    kind: str
    text: str
    column: int


class _Parser:
    """Reads a filter from left to right."""

    def __init__(self, text: str):
        self.text = text
        self.names: set[str] = set()
        self._tokens = [*self._split(), _Token("end", "", len(text) + 1)]
        self._at = 0
        self._depth = 0

    def whole(self) -> Node:
        """Return the node of the whole text."""
        node = self._joined("or")
        if self._next.kind != "end":
            raise self._error("and, or, or the end")
        return node

    def _split(self) -> Iterator[_Token]:
        at = 0
        while at < len(self.text):
            match = _TOKEN.match(self.text, at)
            if match is None:
                raise self._error("a name, a value or a sign", _Token("", self.text[at], at + 1))
            kind, token = str(match.lastgroup), match[0]
            word = _WORDS.get(token, token.lower() if kind == "name" else token)
            if word in ("and", "or", "not", "in", "like", "true", "false", *_CONTAINS):
                kind, token = "word", word
            if kind != "space":
                yield _Token(kind, token, at + 1)
            at = match.end()

    def _joined(self, word: Literal["and", "or"]) -> Node:
        part = (lambda: self._joined("and")) if word == "or" else self._negated
        nodes = [part()]
        while self._accept(word):
            nodes.append(part())
        return nodes[0] if len(nodes) == 1 else Joined(word, tuple(nodes))

    def _negated(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._error(f"at most {_MAX_DEPTH} levels of parentheses and not")
        if self._accept("not"):
            node: Node = Not(self._negated())
        elif self._accept("("):
            node = self._joined("or")
            self._expect(")")
        else:
            node = self._comparison()
        self._depth -= 1
        return node

    def _comparison(self) -> Node:
        if self._next.text in _CONTAINS and self._take():
            self._expect("(")
            at = self._next
            name = self._name()
            self._expect(",")
            value = self._value()
            self._expect(")")
            if name == "id":
                raise self._error("a field that is a list in its place, which id is not", at)
            return Comparison(name, "contains", value)
        name = self._name()
        if self._next.text == "not" and self._take():
            return Not(self._member(name))
        if self._next.text == "in":
            return self._member(name)
        if self._accept("like"):
            if self._next.kind != "string" or "\\" in self._next.text:
                raise self._error("a text without backslashes, in quotation marks")
            return Comparison(name, "like", self._value())
        if self._next.text not in _COMPARE:
            raise self._error(f"one of {' '.join(_COMPARE)}, in, not in, like")
        sign = self._take().text
        if sign not in ("==", "!=") and self._next.text in ("true", "false"):
            raise self._error("a number or a text")
        return Comparison(name, sign, self._value_of(name))

    def _member(self, name: str) -> Node:
        self._expect("in")
        self._expect("[")
        values = [self._value_of(name)]
        while self._accept(","):
            values.append(self._value_of(name))
        self._expect("]")
        return Comparison(name, "in", tuple(values))

    def _name(self) -> str:
        if self._next.kind != "name":
            raise self._error("the name of a field")
        name = self._take().text
        if name == "fields" and self._accept("["):
            if self._next.kind != "string":
                raise self._error("the name of a field in quotation marks")
            name = str(self._value())
            self._expect("]")
        if name != "id":
            self.names.add(name)
        return name

    def _value_of(self, name: str) -> Scalar:
        """Return a value to compare a field with; an id is compared with texts alone."""
        if name == "id" and self._next.kind != "string":
            raise self._error("a text in quotation marks, as ids are texts")
        return self._value()

    def _value(self) -> Scalar:
        token = self._next
        if token.text in ("true", "false"):
            return self._take().text == "true"
        if token.kind == "string":
            self._take()
            return re.sub(
                r"\\(.)", lambda found: self._unescaped(found[1], token), token.text[1:-1]
            )
        if token.kind != "number":
            raise self._error("a number, true, false, or a text in quotation marks")
        value = int(token.text) if re.fullmatch("-?[0-9]+", token.text) else float(token.text)
        if abs(value) > (_LARGEST if isinstance(value, int) else 1e308):
            raise self._error("a number of 64 bits")
        self._take()
        return value

    def _unescaped(self, character: str, token: _Token) -> str:
        if character not in _ESCAPES:
            raise self._error(f"one of {' '.join(_ESCAPES)} behind a backslash", token)
        return _ESCAPES[character]

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self) -> _Token:
        self._at += 1
        return self._tokens[self._at - 1]

    def _accept(self, text: str) -> bool:
        """Take the next token if it is this word or sign, and return whether it was."""
        fits = self._next.kind in ("word", "sign") and self._next.text == text
        self._at += fits
        return fits

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise self._error(text)

    def _error(self, expected: str, found: _Token | None = None) -> SearchError:
        found = found or self._next
        what = shown(found.text) if found.text else "the end"
        return SearchError(
            f"filter {shown(self.text)}, column {found.column}: found {what}, expected {expected}"
        )


def _quoted(value: Any) -> str:
    """Return a value as Milvus reads it."""
    return json.dumps(value, ensure_ascii=False)
