"""The script that checks and measures a GPU runs, at toy size on a CPU, and survives its parts."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOUT = {"card": "none", "versions": {"jax": "0"}}


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_benchmark"]
    sys.path.remove(str(ROOT / "benchmarks"))


def test_a_part_that_fails_or_hangs_does_not_keep_the_others(gpu, tmp_path):
    commands = {
        "fails": ("-c", "raise SystemExit(3)"),
        "hangs": ("-c", "import time; time.sleep(60)"),
        "works": ("-c", "print('| a table |')"),
    }
    found = {}
    for name, command in commands.items():
        part = gpu.Part(name, "", command, command)
        limit = 1 if name == "hangs" else 60
        found[name] = gpu.run(part, False, tmp_path, time.monotonic() + limit)
        gpu.write(tmp_path, ABOUT, found)
    ended = [of["ended"] for of in found.values()]
    assert ended == ["exited with 3", "stopped after 1 s", "ok"]
    assert json.loads((tmp_path / "gpu.json").read_text("utf-8"))["parts"] == found
    assert "\n| a table |\n" in (tmp_path / "gpu.md").read_text("utf-8")


def test_parts_measure_one_by_one(gpu, tmp_path):
    """Two processes that share a lock are never in their timed parts together."""
    timed = (
        "import sys, time; sys.path.insert(0, 'benchmarks'); import machine\n"
        "with machine.alone():\n"
        "    print('|', start := time.monotonic(), '|', flush=True); time.sleep(1)\n"
        "    print('|', time.monotonic(), '|')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), gpu.machine.LOCK: str(tmp_path / "lock")}
    command = [sys.executable, "-c", timed]
    both = [
        subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    spans = sorted([float(at) for at in one.communicate()[0].split() if at != "|"] for one in both)
    (_, end), (start, _) = spans
    assert end <= start


def test_what_comes_last_starts_when_all_is_measured(gpu, tmp_path):
    measured = Future()
    tests = gpu.Part("tests", "", ("-c", "print('| tested |')", "pytest"), (), is_last=True)
    assert [part.name for part in gpu.PARTS if part.is_last] == ["host", "parity"]
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(gpu.run, tests, False, tmp_path, time.monotonic() + 60, [measured])
        assert not wait([job], timeout=1).done
        measured.set_result(None)
        assert job.result()["ended"] == "ok"


def test_every_part_runs_at_toy_size_on_a_cpu(gpu, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu.py", "--smoke", "--out", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    logs = [path.read_text("utf-8")[-2000:] for path in tmp_path.glob("*.log")]
    assert done.returncode == 0, (done.stdout, done.stderr, *logs)
    parts = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["parts"]
    assert set(parts) == {part.name for part in gpu.PARTS if part.smoke}
    assert all(of["results"] for name, of in parts.items() if name != "parity")
