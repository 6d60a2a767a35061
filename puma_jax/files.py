"""Small files that appear whole, and what tells files apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from puma_jax.typing import ndarray


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as indented JSON; the file appears whole, or stays as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    partial.replace(path)


def save_tensors(
    tensors: Mapping[str, ndarray], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that others may read: the library makes it its owner's alone."""
    save_file(dict(tensors), path, metadata)
    os.umask(mask := os.umask(0))
    path.chmod(0o666 & ~mask)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
