"""Types and ranges of settings and of what JSON files hold, declared once and checked everywhere.

A dataclass declares its fields, `Annotated[int, Range(1)]` where not every number will do. `check`
holds an instance to its declaration, `from_json` makes an instance of what a file holds. All that
comes out of either is a `ConfigError` that names the field, the value found and what was expected.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from puma_jax.errors import ConfigError

Kind = TypeVar("Kind")

_SHOWN_CHARACTERS = 60
_DIGITS = re.compile("0|[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes, from `low` to `high`, both included unless they are open."""

    low: float | int = -math.inf
    high: float | int = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float | int) -> bool:
        """Whether a number is finite and lies in the range."""
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below and math.isfinite(number)

    def __str__(self) -> str:
        """Say the range, as the end of "must be"."""
        low, high = _shown_number(self.low), _shown_number(self.high)
        if self.high == math.inf:
            if self.low == -math.inf:
                return "a finite number"
            return f"{'above' if self.open_low else 'at least'} {low}"
        if self.low == -math.inf:
            return f"{'below' if self.open_high else 'at most'} {high}"
        return f"in {'(' if self.open_low else '['}{low}, {high}{')' if self.open_high else ']'}"


def _shown_number(number: float | int) -> str:
    """Return a limit in as few digits as tell it exactly."""
    if isinstance(number, int) and number > 2**31 and number & (number - 1) == 0:
        return f"2^{number.bit_length() - 1}"
    return str(number) if isinstance(number, int) else f"{number:g}"


Count = Annotated[int, Range(1, 2**62)]
"""A whole number of at least 1."""
CountOrZero = Annotated[int, Range(0, 2**62)]
"""A whole number of at least 0."""
Positive = Annotated[float, Range(0, open_low=True)]
"""A number above 0."""
NotNegative = Annotated[float, Range(0)]
"""A number of at least 0."""
Fraction = Annotated[float, Range(0, 1)]
"""A number from 0 to 1."""


def check(config: Any, at: str = "") -> None:
    """Hold every field of a dataclass to its declared type and range.

    Args:
        config: An instance; what lies in its fields has been checked when it was made.
        at: Name of the instance, put before the names of its fields.

    Raises:
        ConfigError: A field holds something else.
    """
    for name, kind in _fields(config.__class__).items():
        _convert(kind, getattr(config, name), f"{at}.{name}" if at else name, from_file=False)


def from_json(
    kind: type[Kind], value: Any, at: str = "", *, unknown: Literal["error", "ignore"] = "error"
) -> Kind:
    """Return a JSON object as an instance of a dataclass.

    Args:
        kind: A dataclass. Its fields may be bool, int, float, str, Path, None, Any, Literal,
            another dataclass, and unions, lists, tuples and dictionaries of these. Keys of
            dictionaries may be str, int or Literal.
        value: What `json` makes of a file.
        at: Name of the value, put before what is wrong with it.
        unknown: "error" refuses fields that a dataclass does not declare, "ignore" drops them.

    Raises:
        ConfigError: The value is of another type, out of range, or a field is missing or unknown.
    """
    return _convert(kind, value, at, from_file=True, ignore=unknown == "ignore")


def shown(value: object) -> str:
    """Return a JSON value as an error message shows it: short, on one line, as in the file."""
    if isinstance(value, Mapping):
        return "{...}"
    if isinstance(value, list | tuple) and len(str(value)) > _SHOWN_CHARACTERS:
        return "[...]"
    if isinstance(value, str):
        # What cannot be printed is escaped: newlines would break the line, lone surrogates stdout.
        cut = value[:_SHOWN_CHARACTERS]
        end = "" if cut == value else "..."
        return json.dumps(cut + end, ensure_ascii=not cut.isprintable())
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _convert(kind: Any, value: Any, at: str, *, from_file: bool, ignore: bool = False) -> Any:
    """Return a value as a type has it; with `from_file`, out of what JSON can express."""
    convert = functools.partial(_convert, from_file=from_file, ignore=ignore)
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        value = convert(arguments[0], value, at)
        for limit in arguments[1:]:
            if isinstance(limit, Range) and value is not None and value not in limit:
                raise ConfigError(f"{_printable(at)} {shown(value)} must be {limit}")
        return value
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in arguments):
            raise _mismatch(value, at, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, at, convert)
    if kind is None or kind is type(None):
        if value is not None:
            raise _mismatch(value, at, "null")
        return None
    if kind in (int, float, bool, str):
        return _convert_scalar(kind, value, at)
    if kind is Path:
        if isinstance(value, str) and from_file:
            return Path(value)
        if not isinstance(value, Path):
            raise _mismatch(value, at, "a path")
        return value
    if origin in (list, tuple):
        return _convert_list(origin, arguments, value, at, convert)
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            raise _mismatch(value, at, "an object")
        keys, values = arguments or (str, Any)
        return {
            _convert_key(keys, key, at, convert): convert(
                values, entry, f"{at}.{key}" if at else str(key)
            )
            for key, entry in value.items()
        }
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if from_file:
            return _convert_dataclass(kind, value, at, convert, ignore)
    if is_typeddict(kind):
        return value
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise _mismatch(value, at, f"a {getattr(kind, '__name__', kind)}")


def _convert_scalar(kind: type, value: Any, at: str) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    # A bool is an int to isinstance, an int of any size a float to everyone else.
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits:
        raise _mismatch(value, at, names[kind])
    if kind is not float:
        return value
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _mismatch(value, at, "a finite number")
    return number


def _convert_key(kind: Any, key: Any, at: str, convert: Any) -> Any:
    """Return a key of a dictionary; in JSON, a number that is a key is a text of digits."""
    if kind is int and isinstance(key, str) and _DIGITS.fullmatch(key):
        return int(key)
    return convert(kind, key, f"{at} key")


def _convert_union(kinds: tuple[Any, ...], value: Any, at: str, convert: Any) -> Any:
    errors = []
    for kind in kinds:
        try:
            return convert(kind, value, at)
        except ConfigError as error:
            errors.append(error)
    alternatives = [
        error for kind, error in zip(kinds, errors, strict=True) if kind is not type(None)
    ]
    if len(alternatives) == 1:
        raise alternatives[0]
    raise _mismatch(value, at, " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds))


def _convert_list(origin: Any, kinds: tuple[Any, ...], value: Any, at: str, convert: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise _mismatch(value, at, "a list")
    if origin is list or kinds[1:] == (...,):
        kinds = (kinds[0] if kinds else Any,) * len(value)
    if len(kinds) != len(value):
        raise _mismatch(value, at, f"a list of {len(kinds)}")
    return origin(
        convert(kind, entry, f"{at}[{number}]")
        for number, (kind, entry) in enumerate(zip(kinds, value, strict=True))
    )


def _convert_dataclass(kind: Any, value: Any, at: str, convert: Any, ignore: bool) -> Any:
    if not isinstance(value, Mapping):
        raise _mismatch(value, at, "an object")
    place = f"{at}." if at else ""
    hints = _fields(kind)
    extra = sorted(map(str, set(value) - set(hints)))
    if extra and not ignore:
        raise ConfigError(f"{_printable(place + extra[0])} is unknown, expected {', '.join(hints)}")
    for field in dataclasses.fields(kind):
        required = field.default is field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in value:
            raise ConfigError(f"{_printable(place)}{field.name} is missing")
    fields = {
        name: convert(hint, value[name], f"{place}{name}")
        for name, hint in hints.items()
        if name in value
    }
    try:
        return kind(**fields)
    except ConfigError as error:
        raise ConfigError(f"{_printable(at)}: {error}" if at else str(error)) from None


def _mismatch(value: object, at: str, expected: str) -> ConfigError:
    return ConfigError(f"{_printable(at) or 'value'} {shown(value)} is not {expected}")


def _printable(name: str) -> str:
    """Return a dotted name as messages show it: keys of a file may hold anything."""
    return name if name.isprintable() else shown(name)[1:-1]


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    """Return the type of every field of a dataclass, ranges included."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
