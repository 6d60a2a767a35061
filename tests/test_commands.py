"""`puma-jax` lists every command, and runs it as `python -m` does."""

import importlib
import subprocess
import sys

import pytest

from puma_jax.__main__ import COMMANDS, usage
from tests import test_structure


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "puma_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_command_is_listed_and_exists():
    named = {module.removesuffix(".__main__") for module, _ in COMMANDS.values()}
    assert {name.removesuffix(".__main__") for name in test_structure.COMMANDS} <= named
    for module in named:
        assert importlib.util.find_spec(module), module
    listed = run()
    assert listed.stdout.strip() == usage()
    assert all(f"  {name}" in listed.stdout for name in COMMANDS)
    assert listed.returncode == 0


def test_a_command_runs_as_its_module_does():
    ours = run("prune", "--help")
    theirs = subprocess.run(
        [sys.executable, "-m", "puma_jax.prune", "--help"], capture_output=True, text=True
    )
    assert (ours.returncode, ours.stdout) == (0, theirs.stdout)
    failed = run("prune", "--model", "nowhere", "--keep-layers", "1", "--out", "out")
    assert failed.returncode == 2


def test_an_unknown_command_is_refused_with_those_there_are():
    failed = run("sreve")
    assert failed.returncode == 2
    assert failed.stderr.startswith('error: there is no command "sreve", expected one of train,')


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_does_on_one_line(name):
    line = COMMANDS[name][1]
    assert len(line) <= 70
    assert line[0].isupper()
    assert not line.endswith(".")
