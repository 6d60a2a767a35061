"""The check before a long job passes where all is well, and says what is not."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from puma_jax.errors import PumaError

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch/preflight.py"


@pytest.fixture(scope="module")
def preflight():
    spec = importlib.util.spec_from_file_location("preflight", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._GATHERED_MIB = 1  # 64 in the test of two processes
    return module


def check(preflight, capsys, **settings):
    """Return exit code and output of a run on the eight devices of the tests."""
    with pytest.raises(SystemExit) as ending:
        preflight.main(min_free_gib=0.01, **settings)
    return ending.value.code, capsys.readouterr().out


def test_all_is_well_with_eight_devices(preflight, capsys, tmp_path):
    code, output = check(preflight, capsys, bucket=str(tmp_path / "runs"))
    lines = output.splitlines()
    assert code == 0, output
    names = ["devices", "versions", "total", "bandwidth", "clock", "disk", "folder"]
    assert [line.split(":")[0] for line in lines] == [f"ok   {name}" for name in names]
    assert lines[0] == "ok   devices: hosts: 1, cpu: 8"
    assert "jax 0." in lines[1]
    assert "1 + ... + 8 is 36" in lines[2]
    assert not list((tmp_path / "runs").iterdir())


def test_a_folder_that_cannot_be_written_fails(preflight, capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, output = check(preflight, capsys, bucket=str(tmp_path / "file/runs"), json=True)
    assert code == 1
    found = json.loads(output)
    assert not found["ok"]
    failed = [result for result in found["checks"] if not result["ok"]]
    assert [result["name"] for result in failed] == ["folder"]
    assert failed[0]["found"].startswith("host 0: NotADirectoryError: ")
    assert failed[0]["found"].endswith("expected a folder that all hosts share and may write to")


def test_a_full_disk_fails(preflight):
    with pytest.raises(PumaError, match=r"host 0: .* GiB free in .*; expected 1e\+09 GiB"):
        preflight.disk(1e9)


def test_hosts_that_differ_are_named(preflight, monkeypatch):
    def two(change):
        monkeypatch.setattr(preflight, "gather", lambda text: [text, change(text)])

    two(lambda text: text.replace('"jax": "0.', '"jax": "7.'))
    with pytest.raises(PumaError, match=r"jax is 0\..* on host 0 but 7\..* on host 1: install"):
        preflight.versions()
    two(lambda text: str(float(text or 0) + 9))
    with pytest.raises(PumaError, match=r"host 0 \+0.0 s, host 1 \+9.0 s, expected 2.0 s at most"):
        preflight.clock()
    two(lambda text: str(float(text or 0) - 1))
    assert preflight.clock() == "1.00 s apart"


def test_another_platform_than_was_asked_for_fails(preflight, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    with pytest.raises(PumaError, match="JAX_PLATFORMS asks for cuda"):
        preflight.devices()


def test_two_processes_check_each_other(tmp_path):
    settings = dict(
        line.split("=", 1)
        for line in (REPOSITORY / "launch/env/cpu.env").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    command = [REPOSITORY / "launch/local_multiprocess.sh", "2", sys.executable, SCRIPT]
    flags = ["--bucket", tmp_path, "--min-free-gib", "0.01"]
    run = subprocess.run(
        [*command, *flags], env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if "Gloo" not in line]
    assert lines[0] == "[0] ok   devices: hosts: 2, cpu: 4"
    assert "[0] ok   total: 1 + ... + 4 is 10" in lines
    assert all(line.startswith("[0] ok   ") for line in lines)
    assert len(lines) == 7
