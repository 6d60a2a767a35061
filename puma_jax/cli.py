"""Shared by all entry points: typed flags, and errors printed as one line."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import tyro

from puma_jax import compilation_cache
from puma_jax.errors import PumaError, one_line, printable

# What a user, and not a fault in the program, makes of a disk, a folder, or a limit of the system.
_ERRORS_OF_THE_PLACE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ESTALE),
}


def run(main: Callable[..., None]) -> None:
    """Call `main` with arguments from the command line; exit with 2 on a PumaError."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else None

    # What tyro prints has escape sequences of its own, what `main` prints may have none.
    @functools.wraps(main)
    def printing(*arguments: object, **named: object) -> None:
        compilation_cache.enable()
        with printable_output():
            main(*arguments, **named)

    exit_on_error(lambda: tyro.cli(printing, prog=module and f"python -m {module}"))


def exit_on_error(main: Callable[[], None]) -> None:
    """Call `main`; print an error that users can cause as one line, and exit with its code.

    The code is 2 for a PumaError or a disk that is full or not writable, 130 for an interrupt from
    the keyboard, and 141, without a message, if what reads the output has gone.
    """
    try:
        try:
            main()
        except SystemExit:  # of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except PumaError as error:
        _print_error(str(error))
        _exit(2, together=error.in_all_processes)
    except KeyboardInterrupt:
        _print_error("interrupted")
        _exit(130, together=False)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            # Python flushes once more when it ends, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _exit(141, together=False)
        if isinstance(error, OSError) and error.errno in _ERRORS_OF_THE_PLACE:
            place = f"{error.filename}: " if error.filename is not None else ""
            _print_error(f"{place}{error.strerror}")
            _exit(2, together=False)
        traceback.print_exc()
        _exit(1, together=False)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Make all that is printed to stdout `printable`: names of files and ids come from anywhere."""
    with contextlib.redirect_stdout(_Printable(sys.stdout)):
        yield


class _Printable(io.TextIOBase):
    """A stream that passes on what is printable, and the rest escaped."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str, /) -> int:
        self._stream.write(printable(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def _nobody_reads() -> bool:
    """Whether the other end of stdout is closed; a worker's pipe may break, too."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _print_error(message: str) -> None:
    print(f"error: {one_line(message)}", file=sys.stderr)


def _exit(code: int, *, together: bool) -> None:
    """Exit, at once if other processes still run: a clean exit would wait for them."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized() and not together:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
