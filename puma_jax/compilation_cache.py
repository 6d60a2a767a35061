"""Compiled programs are kept on disk, so that the second start of a command is fast."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

_MOST_BYTES = 4 * 2**30
_SETTINGS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(_MOST_BYTES),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}


def enable() -> None:
    """Let JAX keep compiled programs in `folder()`, at most 4 GiB, the least recently used go.

    JAX's environment variables come first: JAX_COMPILATION_CACHE_DIR is another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # its size, too, is that of whoever chose it
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: programs are compiled each time
        return
    settings = {**_SETTINGS, "JAX_COMPILATION_CACHE_DIR": str(folder())}
    missing = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(missing)  # for processes that this one starts, and where JAX comes later
    jax = sys.modules.get("jax")
    if jax is not None:
        for name, value in missing.items():
            kind = type(getattr(jax.config, name.lower()))
            jax.config.update(name.lower(), value if kind not in (int, float) else kind(value))


def folder() -> Path:
    """Return the folder of the programs for the processor of this machine.

    Programs for a CPU use the instructions that it has; a home folder may be shared by machines.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kind = hashlib.sha256(f"{platform.machine()} {_instructions()}".encode()).hexdigest()[:8]
    return Path(base, "puma_jax", "programs", kind)


def _instructions() -> str:
    """Return what the first processor can do, as Linux lists it; its name elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kept)))
