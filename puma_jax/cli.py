"""What every entry point shares: typed flags, and errors that take one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

import tyro

from puma_jax.errors import PumaError


def run(main: Callable[..., None]) -> None:
    """Call `main` with arguments from the command line; exit with 2 on a PumaError."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else None
    exit_on_error(lambda: tyro.cli(main, prog=module and f"python -m {module}"))


def exit_on_error(main: Callable[[], None]) -> None:
    """Call `main`; print a PumaError as one line and exit with 2."""
    try:
        main()
    except PumaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
