"""Damage files of every kind thousands of times, and print what their readers did.

`python -m tests.fuzz --format all --count 3000`

Each kind is read in a process of its own, within bounds on time and memory. Exits with 1 if
anything but a declared error came out.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import resource
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from tests.fuzz import Outcome, add, mutations, read_damaged

_SECONDS = 20
"""Longest time for one file; the start, with its imports and compilations, may take longer."""
_SECONDS_TO_START = 300
_BYTES = 2 << 30
"""Memory that reading may take on top of what the process has when it starts."""


def main() -> None:
    """Run the command."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    from tests.fuzz.formats import FORMATS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=["all", *FORMATS], default="all")
    parser.add_argument("--count", type=int, default=3000, help="damaged files of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)  # the process of one format
    options = parser.parse_args()
    if options.start is not None:
        work(options.format, options.seed, options.start, options.count)
        return
    names = list(FORMATS) if options.format == "all" else [options.format]
    row = "{:24} {:>9} {:>9} {:>9} {:>9}".format
    print(row("format", "mutations", "declared", "accepted", "other"), flush=True)
    outcomes = {}
    for name in names:
        outcome = outcomes[name] = fuzz(name, options.seed, options.count)
        total = outcome.others.total()
        print(row(name, outcome.count, outcome.declared, outcome.accepted, total), flush=True)
    for name, outcome in outcomes.items():
        for what, times in _kinds(outcome).most_common(10):
            print(f"{name}: {times} x {what}")
    sys.exit(any(outcome.others for outcome in outcomes.values()))


def fuzz(name: str, seed: int, count: int) -> Outcome:
    """Return the outcome for a format; a process that hangs or dies is followed by another."""
    outcome = Outcome()
    while outcome.count < count:
        before = outcome.count
        command = [sys.executable, "-m", "tests.fuzz", "--format", name, "--seed", str(seed)]
        command += ["--start", str(before), "--count", str(count)]
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0)
            with process:
                ended = _collect(process, outcome)
            errors.seek(0)
            last = (errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
        if outcome.count == before and ended.startswith("exit"):
            add(outcome, f"cannot be read as it is: {last}"[:160])
            break
        if outcome.count < count:
            add(outcome, f"{ended}: {last}"[:160])
    return outcome


def work(name: str, seed: int, start: int, count: int) -> None:
    """Read damaged files from number `start` on; print a line for each."""
    from tests.fuzz.formats import FORMATS

    results = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)  # what readers print is no result
    with tempfile.TemporaryDirectory() as folder:
        target = FORMATS[name](Path(folder))
        target.read()
        content = target.path.read_bytes()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + _BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        print("started", file=results, flush=True)
        for damaged in itertools.islice(mutations(content, seed, count), start, None):
            result = " ".join(read_damaged(target, damaged).splitlines())
            print(result, file=results, flush=True)


def _collect(process: subprocess.Popen[bytes], outcome: Outcome) -> str:
    """Count the results of a process; return how it ended."""
    assert process.stdout is not None
    reader, seconds = _Lines(process.stdout), _SECONDS_TO_START
    while True:
        line = reader.read(seconds)
        if line is None:
            process.kill()
            return f"no end within {seconds} s"
        if not line:
            code = process.wait()
            return f"exit {code}" if code >= 0 else f"killed by signal {-code}"
        if line != "started":
            add(outcome, line)
        seconds = _SECONDS


class _Lines:
    """Lines of a pipe, with a limit on the time for each."""

    def __init__(self, pipe: IO[bytes]):
        self.pipe, self.waiting = pipe, b""

    def read(self, seconds: float) -> str | None:
        """Return the next line, "" at the end, or None if none comes in time."""
        while b"\n" not in self.waiting:
            if not select.select([self.pipe], [], [], seconds)[0]:
                return None
            piece = os.read(self.pipe.fileno(), 1 << 16)
            if not piece:
                return ""
            self.waiting += piece
        line, _, self.waiting = self.waiting.partition(b"\n")
        return line.decode()


def _kinds(outcome: Outcome) -> collections.Counter[str]:
    """Return how often each kind of other result came, told by its first words."""
    kinds: collections.Counter[str] = collections.Counter()
    for what, times in outcome.others.items():
        kinds[what[:80]] += times
    return kinds


if __name__ == "__main__":
    main()
