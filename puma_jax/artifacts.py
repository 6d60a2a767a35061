"""Files and folders that a job writes: claimed, locked, and written whole.

The one home of four promises, whatever is written:

- a file or a folder appears whole, or stays as it was (`atomic_file`, `atomic_folder`);
- what appeared survives a power failure;
- a place that cannot be written is refused before long work (`check_output`);
- a folder belongs to one job, told by content, and to one process at a time (`claim`, `lock`).

Nothing is ever deleted or overwritten that does not bear our mark, a name from `_partial_name`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from puma_jax.errors import ArtifactError, PumaError
from puma_jax.files import as_json, read_json
from puma_jax.schema import shown

try:
    import fcntl
except ImportError:  # not on Windows, where no lock is held
    fcntl = None  # type: ignore[assignment]

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial")
_LOCK = ".lock"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which becomes `path` if the block ends well.

    Folders above it are made. What has the name `path` is replaced, or stays as it was.

    Raises:
        ArtifactError: The file cannot be written.
    """
    partial = path.with_name(_partial_name(path.name))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose content is that of `folder` if the block ends well.

    A missing folder appears whole. One that exists and is empty, which may be a mounted volume or
    the working directory, stays the folder it is and is filled at the end.

    Raises:
        ArtifactError: The folder is not empty, or cannot be written.
    """
    target = check_output(folder)
    within = target.is_dir()
    parent, name = (target, "content") if within else (target.parent, target.name)
    with writing(folder):
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, name)
        partial = parent / _partial_name(name)
        partial.mkdir()
        held = os.open(partial, os.O_RDONLY)
        try:
            _try_lock(held)
            yield partial
            sync(partial)
            check_output(target)  # nothing of another process may have come meanwhile
            if within:
                for child in sorted(partial.iterdir()):
                    os.replace(child, target / child.name)
            else:
                os.replace(partial, target)
            _sync(parent)
        except PumaError as error:  # of one who wrote into it, and names what is about to go
            error.args = (str(error).replace(str(partial), str(folder)),)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(held)


def check_output(folder: Path) -> Path:
    """Return the absolute path of a folder to write, known to be empty or missing, and writable.

    Raises:
        ArtifactError: It holds something, is a file, or may not be written.
    """
    with writing(folder):
        target = Path(os.path.abspath(folder))
        if target.exists() or target.is_symlink():
            if not target.is_dir():
                raise ArtifactError(f"{folder} is a file: choose another folder")
            if any(not _is_ours(path) for path in target.iterdir()):
                raise ArtifactError(f"{folder} is not empty: choose another folder, or remove it")
        existing = next(path for path in (target, *target.parents) if path.exists())
        if not existing.is_dir():
            raise ArtifactError(f"{folder} cannot be written: {existing} is a file")
        with tempfile.TemporaryFile(dir=existing):
            return target


def claim(
    folder: Path,
    marker: str,
    job: Mapping[str, Any],
    *,
    what: str,
    adopt: Mapping[str, Callable[[], Any]] | None = None,
    may_differ: Collection[str] = (),
) -> dict[str, Any]:
    """Make a folder that of a job, or check that it is; return what its marker holds.

    Of several processes that claim a folder at once, one creates the marker, the others read it.

    Args:
        folder: Missing, empty, or of this job.
        marker: Name of the JSON file in the folder that says whose it is.
        job: All that decides what is in the folder, as JSON has it.
        what: What the folder holds, for messages, such as "vectors".
        adopt: Further fields of the marker, and what computes them for a folder that is new; a
            folder that exists keeps those it has.
        may_differ: Dotted names of fields of `job` that may differ.

    Raises:
        ArtifactError: The folder holds something else, is another job's, or cannot be written.
    """
    path, adopt = folder / marker, adopt or {}
    wanted = json.loads(json.dumps(dict(job), default=str))
    if not path.exists():
        foreign = folder.exists() and not all(map(_is_ours, _entries(folder, what)))
        if foreign and not path.exists():  # else another process has created it meanwhile
            raise ArtifactError(f"{folder} is not empty and holds no {what}: choose another folder")
        _create(path, {**wanted, **{name: compute() for name, compute in adopt.items()}})
    found = read_json(path)
    for name, there, here in differences(found, wanted):
        if not any(name == one or name.startswith(f"{one}.") for one in (*adopt, *may_differ)):
            raise ArtifactError(
                f"{folder} holds {what} of another job, which differs in {shown(name)[1:-1]} "
                f"({shown(there)} there, {shown(here)} here): choose another folder, "
                "or delete this one"
            )
    return found


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], at: str = ""
) -> list[tuple[str, Any, Any]]:
    """Return the dotted name of every field that two objects differ in, and both values.

    A field that one of them lacks counts as null there.
    """
    different = []
    for name in dict.fromkeys((*wanted, *found)):
        there, here = found.get(name), wanted.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            different += differences(there, here, f"{at}{name}.")
        elif there != here:
            different.append((f"{at}{name}", there, here))
    return different


@contextlib.contextmanager
def lock(folder: Path, part: str = "") -> Iterator[None]:
    """Keep other processes out of a folder, or out of a part of it, while the block runs.

    The lock ends with the process, however that ends. What killed processes left half written is
    removed.

    Args:
        folder: Made if it is missing.
        part: Name of the part; jobs on different parts do not keep each other out.

    Raises:
        ArtifactError: Another process holds the lock, or the folder cannot be written.
    """
    path = folder / (f"{_LOCK}-{part}" if part else _LOCK)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (held open as long as the lock is)
    with file:
        if not _try_lock(file.fileno()):
            raise ArtifactError(f"another process writes {folder}: wait until it ends, or stop it")
        if not part:
            for entry in folder.iterdir():
                if is_partial(entry):
                    _remove(entry)
        yield


def is_partial(path: Path) -> bool:
    """Whether a path is of something that was never finished: of our own making, and no one's."""
    return _PARTIAL.fullmatch(path.name) is not None


def sync(folder: Path) -> None:
    """Wait until a folder, with all that is in it, would survive a power failure.

    Raises:
        ArtifactError: The disk is full, or fails.
    """
    with writing(folder):
        for path, _, files in os.walk(folder, topdown=False):
            for file in files:
                _sync(Path(path, file))
            _sync(Path(path))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON; the file appears whole, or stays as it was.

    Raises:
        ArtifactError: The file cannot be written.
    """
    write_text(path, as_json(value))


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8, which appears whole; errors as of `write_json`."""
    with atomic_file(path) as partial:
        partial.write_text(text, "utf-8", newline="\n")


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give a file another name; where the file system allows no hard link, copy it."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


@contextlib.contextmanager
def writing(path: Path, *, error: type[PumaError] = ArtifactError) -> Iterator[None]:
    """Turn the operating system's errors while a path is written into one line.

    Raises:
        PumaError: Of the class `error`.
    """
    try:
        yield
    except PumaError:
        raise
    except Exception as reason:
        said = _said_by_system(reason)
        if said is None:
            raise
        raise error(f"{path} cannot be written: {said}") from reason


def _said_by_system(error: Exception) -> str | None:
    """Return what the operating system said, or None if the error is of another kind.

    safetensors and tokenizers, which are written in Rust, put its number into errors of their own.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(r"\(os error ([0-9]+)\)", str(error))
    if found:
        return os.strerror(int(found[1]))
    return str(error) if isinstance(error, OSError) else None


def _remove_abandoned(parent: Path, name: str) -> None:
    """Remove temporary folders for this name that no process holds any more."""
    for path in parent.glob(f"{glob.escape(f'.{name[:64]}.')}*"):
        if is_partial(path) and path.is_dir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if fcntl is not None and _try_lock(descriptor):
                    _remove(path)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _try_lock(descriptor: int) -> bool:
    """Lock a file or folder until it is closed; return False if another process has locked it.

    Where the file system knows no locks, one process at a time is its user's affair.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _partial_name(name: str) -> str:
    """Return a name that no other file has, and that says that it is ours."""
    return f".{name[:64]}.{secrets.token_hex(8)}.partial"


def _create(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file unless there is one; the one that is there first stays."""
    partial = path.with_name(_partial_name(path.name))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(as_json(value), "utf-8", newline="\n")
            _sync(partial)
            with contextlib.suppress(FileExistsError):
                _link(partial, path)
            _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """Give a file its name, unless that is taken."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with open(path, "xb") as file:
            file.write(partial.read_bytes())
            file.flush()
            os.fsync(file.fileno())


def _is_ours(path: Path) -> bool:
    """Whether a folder with this in it still counts as empty: a lock, or what was not finished."""
    return is_partial(path) or path.name.startswith(_LOCK)


def _entries(folder: Path, what: str) -> Iterator[Path]:
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is a file, expected a folder for {what}: choose another")
    with writing(folder):
        yield from folder.iterdir()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems do not know how to, folders' above all.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
