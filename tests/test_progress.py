"""Progress is a bar on a terminal, and elsewhere few plain lines."""

import io
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import puma_jax
from puma_jax import progress
from puma_jax.progress import SECONDS_BETWEEN_LINES, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_at_intervals_and_one_at_the_end(clock, capsys):
    with Progress(total=1000, desc="embedding", unit="item", initial=100) as bar:
        for _ in range(2 * SECONDS_BETWEEN_LINES):
            clock[0] += 1
            bar.update(15)
        bar.set_postfix_str("loss 1.25")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "embedding: 550/1000, 15.00item/s, 00:30 left"
    assert len(lines) == 3
    assert lines[-1].startswith("embedding: 1000/1000, ")
    assert lines[-1].endswith(" left, loss 1.25")


def test_the_first_step_which_compiles_promises_nothing(clock, capsys):
    with Progress(total=1000, unit="step") as bar:
        clock[0] += 117
        bar.update()
        clock[0] += 117
        bar.update(234)
    first, second, _ = capsys.readouterr().err.splitlines()
    assert first == "1/1000, ?step/s, ? left"
    assert second == "235/1000,  2.00step/s, 06:22 left"


def test_short_work_prints_nothing_in_a_log(clock, capsys):
    with Progress(total=10) as bar:
        bar.update(10)
        clock[0] += SECONDS_BETWEEN_LINES - 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_between_goes_to_stdout_whole(terminal, monkeypatch, capsys):
    if terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
    for disable in (False, True):
        with Progress(total=4, disable=disable) as bar:
            bar.update(2)
            bar.write("compiling again")
    assert capsys.readouterr().out == "compiling again\n"


def test_work_of_unknown_length_has_no_time_left(clock, capsys):
    with Progress(total=None, unit="B", unit_scale=True) as bar:
        clock[0] += SECONDS_BETWEEN_LINES
        bar.update(3_000_000)
    assert capsys.readouterr().err.splitlines()[0] == "3.00M, 100kB/s"


@pytest.mark.parametrize("disable", [False, True])
def test_a_terminal_gets_a_bar_unless_it_is_disabled(disable, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(total=4, desc="embedding", disable=disable) as bar:
        bar.update(4)
    shown = sys.stderr.getvalue()
    assert ("4/4" in shown and "\r" in shown) == (not disable)
    assert bool(shown) == (not disable)


def test_no_count_of_a_thread_is_lost(clock, capsys):
    with Progress(total=4000) as bar, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: bar.update(), range(3999)))
        clock[0] += SECONDS_BETWEEN_LINES
        bar.update()
    assert capsys.readouterr().err.startswith("4000/4000, ")


def test_all_bars_of_the_package_are_these():
    package = Path(puma_jax.__file__).parent
    users = [path for path in package.rglob("*.py") if re.search(r"\btqdm\b", path.read_text())]
    assert users == [package / "progress.py"]
