"""Shared by all entry points: typed flags, and errors printed as one line."""

from __future__ import annotations

import os
import sys
import traceback
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
        _exit(2, together=error.in_all_processes)
    except Exception:
        traceback.print_exc()
        _exit(1, together=False)


def _exit(code: int, *, together: bool) -> None:
    """Exit, at once if other processes still run: a clean exit would wait for them."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized() and not together:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
