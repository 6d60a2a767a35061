"""The packages that the benchmarks are built from: the `demo` extra, which may be missing."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable
from types import ModuleType

from puma_jax.errors import ConfigError


def demo_package(module: str) -> ModuleType:
    """Import and return a module of the demo packages.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(error.name or module) from None


def demo_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that the bytes of a build depend on, by name on PyPI.

    Args:
        packages: Their names on PyPI; that of Pillow, which compresses the drawings, is added.

    Raises:
        ConfigError: A demo package is not installed.
    """
    versions = {}
    for package in (*packages, "pillow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise _missing(package) from None
    return versions


def _missing(name: str) -> ConfigError:
    return ConfigError(
        f"the demo benchmark needs {name}, which is not installed: run pip install -e '.[demo]' in "
        "the clone of puma_jax"
    )
