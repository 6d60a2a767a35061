"""Files read back checked, and what tells one state of a file from another.

What a job writes, `artifacts` writes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError
from safetensors.numpy import save_file

from puma_jax.errors import ArtifactError, ConfigError, PumaError
from puma_jax.schema import from_json, shown
from puma_jax.typing import ndarray

Kind = TypeVar("Kind")

MAX_JSON_BYTES = 1 << 28
"""A larger file of JSON is refused unread."""


def as_json(value: Any) -> str:
    """Return indented JSON that ends with a newline."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def read_json(path: Path, *, error: type[PumaError] = ArtifactError) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        PumaError: Of the class `error`; the file is missing, too large, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        value = parse_json(content)
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from None
    except ValueError as reason:
        raise error(f"{path} is not readable JSON: {reason}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds {shown(value)}, expected an object {{...}}")
    return value


def read_object(
    path: Path,
    kind: type[Kind],
    *,
    error: type[PumaError] = ArtifactError,
    unknown: Literal["error", "ignore"] = "error",
) -> Kind:
    """Return what a JSON file holds as an instance of a dataclass.

    Raises:
        PumaError: Of the class `error`; see `read_json` and `schema.from_json`.
    """
    value = read_json(path, error=error)
    try:
        return from_json(kind, value, unknown=unknown)
    except ConfigError as reason:
        raise error(f"{path}: {reason}") from None


def parse_json(content: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is too long or too deep, not UTF-8, not JSON, or gives a key twice; the
            message says which in one line.
    """
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"longer than {MAX_JSON_BYTES:,} bytes")
    try:
        return DECODER.decode(content.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        position, value = error.start, content[error.start]
        raise ValueError(f"byte {position + 1}, 0x{value:02x}, is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


@dataclass(frozen=True)
class Digest:
    """Size, time and SHA-256 of a file, which tell one state of it from another."""

    bytes: int
    modified_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path, known: Digest | None = None) -> Digest:
        """Return the digest of a file; one whose size and time are those known is not read again.

        Raises:
            OSError: The file cannot be read.
        """
        status = path.stat()
        size, modified = status.st_size, status.st_mtime_ns
        if known is not None and (known.bytes, known.modified_ns) == (size, modified):
            return known
        return cls(size, modified, sha256(path))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(value: Any) -> str:
    """Return the SHA-256 of a value that JSON can express; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def save_tensors(
    tensors: Mapping[str, ndarray], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that others may read: the library makes it its owner's alone.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    os.umask(mask := os.umask(0))
    path.chmod(0o666 & ~mask)


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object; of two values under one key, JSON readers would differ in which counts."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {shown(twice)} is given twice")
    return value


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads and other JSON readers do not."""
    raise ValueError(f"{name} is no JSON number")


DECODER = json.JSONDecoder(
    object_pairs_hook=_object_of_unique_keys, parse_constant=_refuse_constant
)
"""Reads the JSON that all readers agree on; errors are ValueError."""
