"""Several real processes do what one does: train, stop, resume, evaluate, embed."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from puma_jax.errors import ConfigError
from puma_jax.parallel.multihost import DistributedConfig
from puma_jax.search.shards import Vectors
from tests.data.fake_mbeir import write_test_sets, write_union
from tests.processes import environment

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "tests/training/tiny_run.py"
POOL = "cand_pool/global/mbeir_union_test_cand_pool.jsonl"


class Processes:
    """Some processes that run the same command, each with its own devices."""

    def __init__(self, count: int, devices: int, module: str, *flags: object):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.running = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", f"puma_jax.{module}", *map(str, flags)),
                    *("--distributed.coordinator", f"localhost:{port}"),
                    *("--distributed.processes", str(count)),
                    *("--distributed.process", str(number)),
                ],
                cwd=REPOSITORY,
                env=environment(devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]

    def finish(self) -> list[tuple[int, str, str]]:
        """Return exit code, output and errors of each."""
        found = [process.communicate() for process in self.running]
        codes = [process.returncode for process in self.running]
        return [(code, *texts) for code, texts in zip(codes, found, strict=True)]


SPLIT = ("--mesh.fsdp", 4, "--mesh.data", 1)
"""Weights over four devices."""


def train(count, devices, workdir, root, *flags):
    where = ("--config", CONFIG, "--workdir", workdir, "--data.root", root)
    return Processes(count, devices, "train", *where, *flags)


def succeeded(processes):
    found = processes.finish()
    assert [code for code, _, _ in found] == [0] * len(found), "\n".join(map(str, found))
    return [output for _, output, _ in found]


def weights(workdir):
    return load_file(workdir / "cut/model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_test_sets(write_union(tmp_path_factory.mktemp("benchmark")))


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """A run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    succeeded(train(1, 4, workdir, root))
    return workdir


@pytest.fixture(scope="module")
def pair(root, tmp_path_factory):
    """A run of two processes with two devices each, weights split over all four."""
    workdir = tmp_path_factory.mktemp("runs") / "pair"
    outputs = succeeded(train(2, 2, workdir, root, *SPLIT))
    return workdir, outputs


def test_two_processes_train_what_one_does(alone, pair):
    workdir, outputs = pair
    for name, leaf in weights(workdir).items():
        np.testing.assert_allclose(leaf, weights(alone)[name], rtol=0, atol=1e-5, err_msg=name)
    assert "The model is in" in outputs[0]
    assert "The model is in" not in outputs[1]
    found, expected = (json.loads((run / "results.json").read_text()) for run in (workdir, alone))
    assert found["stages"]["cut"]["evaluation"] == expected["stages"]["cut"]["evaluation"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["stage"] == "cut" and "loss" in line]
    assert steps == list(range(1, 9))


def test_a_run_goes_on_with_another_number_of_processes(alone, pair, root, tmp_path):
    """The programs are those of the runs before, which are not compiled again."""
    run = train(2, 2, tmp_path / "run", root, *SPLIT)
    metrics = tmp_path / "run/metrics.jsonl"
    while all(process.poll() is None for process in run.running):
        if metrics.exists() and '"cut", "step": 3' in metrics.read_text():
            run.running[1].send_signal(signal.SIGTERM)  # one is asked, all stop
            break
        time.sleep(0.01)
    outputs = succeeded(run)
    assert outputs[0].strip().endswith("rerun the same command to resume")
    assert not (tmp_path / "run/cut").exists()
    succeeded(train(1, 4, tmp_path / "run", root))
    for name, leaf in weights(tmp_path / "run").items():
        np.testing.assert_allclose(leaf, weights(alone)[name], rtol=0, atol=1e-5, err_msg=name)


def test_they_evaluate_and_embed_as_one_does(alone, root, tmp_path):
    numbers, vectors = {}, {}
    for count in (1, 2):
        at = tmp_path / str(count)
        model = ("--model", alone / "cut")
        kept = ("--vectors-dir", at / "kept")
        out = ("--data.root", root, "--out", at / "found")
        succeeded(Processes(count, 2, "evaluate", *model, *out, *kept))
        assert not list((at / "kept").iterdir())
        items = ("--items", root / POOL, "--out", at / "vectors", "--items-per-shard", 32)
        outputs = succeeded(Processes(count, 2, "embed", *model, *items))
        said = "225 of 225" if count == 1 else "Part 0/2: 128 of 128"
        assert f"{said} items embedded" in outputs[0]
        numbers[count] = (at / "found/results.json").read_bytes()
        vectors[count] = np.concatenate([*Vectors(at / "vectors", verify=True).parts()])
    assert numbers[1] == numbers[2]
    np.testing.assert_array_equal(vectors[1], vectors[2])


def test_what_goes_wrong_in_one_ends_all_with_its_message(tmp_path, root):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/note").write_text("mine")
    for code, _, errors in train(2, 1, tmp_path / "run", root).finish():
        assert code == 2
        assert "run is not empty: choose another folder" in errors
        assert "Traceback" not in errors


def test_half_a_setting_is_refused():
    with pytest.raises(ConfigError, match="give coordinator, processes and process, or auto"):
        DistributedConfig(coordinator="localhost:1")
