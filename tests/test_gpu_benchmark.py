"""The script that checks and measures a GPU runs, at toy size on a CPU, and survives its parts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOUT = {"card": "none", "versions": {"jax": "0"}}


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_benchmark"]


def test_a_part_that_fails_or_hangs_does_not_keep_the_others(gpu, tmp_path):
    commands = {
        "fails": ("-c", "raise SystemExit(3)"),
        "hangs": ("-c", "import time; time.sleep(60)"),
        "works": ("-c", "print('| a table |')"),
    }
    found = {}
    for name, command in commands.items():
        part = gpu.Part(name, "", command, command, 1 if name == "hangs" else 60)
        found[name] = gpu.run(part, False, tmp_path)
        gpu.write(tmp_path, ABOUT, found)
    ended = [of["ended"] for of in found.values()]
    assert ended == ["exited with 3", "stopped after 1 s", "ok"]
    assert json.loads((tmp_path / "gpu.json").read_text("utf-8"))["parts"] == found
    assert "\n| a table |\n" in (tmp_path / "gpu.md").read_text("utf-8")


def test_all_parts_end_within_the_eight_minutes_that_a_card_is_lent(gpu):
    assert sum(part.seconds for part in gpu.PARTS) <= 480
    assert all(part.command != part.smoke for part in gpu.PARTS)


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
