"""A run as users start it: it survives a kill, stops when asked, and says what is wrong."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from puma_jax.artifacts import lock
from tests.data.fake_mbeir import write_test_sets, write_union
from tests.processes import environment

CONFIG = Path(__file__).with_name("tiny_run.py")
REPOSITORY = CONFIG.parents[2]


def command(workdir: Path, root: Path, *flags: str, config: Path = CONFIG) -> list[str]:
    return [
        *(sys.executable, "-m", "puma_jax.train", "--config", str(config)),
        *("--workdir", str(workdir), "--data.root", str(root), *flags),
    ]


def run(
    *arguments, devices: int = 1, log_compiles: bool = False, **options
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments, **options),
        env={**environment(devices), "JAX_LOG_COMPILES": str(int(log_compiles))},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def interrupt(number: int, at: int, *arguments, devices: int = 1) -> tuple[int, str]:
    """Send a signal once stage "cut" has logged a step; return the exit code and the output."""
    process = subprocess.Popen(
        command(*arguments),
        env=environment(devices),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = arguments[0] / "metrics.jsonl"
    while process.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if sum('"cut"' in line for line in lines) >= at:
            process.send_signal(number)
            break
        time.sleep(0.01)
    output, _ = process.communicate()
    return process.returncode, output


def weights(workdir: Path) -> dict[str, np.ndarray]:
    return load_file(workdir / "cut/model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Training and test sets of a few dozen items, one of them with a name of its own."""
    return write_test_sets(write_union(tmp_path_factory.mktemp("benchmark")))


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run that nothing interrupted, what it printed, and its log."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = run(workdir, root, "--log.profile", "2", "3", log_compiles=True)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout, done.stderr


def test_a_run_leaves_models_metrics_and_results(whole):
    workdir, output, _ = whole
    results = json.loads((workdir / "results.json").read_text())
    assert results["stages"]["cut"]["layers"] == 2
    assert len(results["stages"]["cut"]["evaluation"]["sets"]) == 16
    assert results["versions"]["jax"]
    *_, model, page = output.strip().splitlines()
    assert str(workdir / "cut") in model
    assert "results.json" in model
    assert str(workdir / "report.html") in page
    assert 'href="results/cut/report.html"' in (workdir / "report.html").read_text()
    assert "What queries found" in (workdir / "results/cut/report.html").read_text()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["stage"] == "cut" and "loss" in line]
    assert len(losses) == 8
    assert any("hit@k local" in line for line in lines)
    assert not (workdir / "checkpoints/cut").exists()


def test_steps_say_what_they_cost(whole):
    workdir, output, _ = whole
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    for line in steps:
        assert 0 <= line["seconds_waited"] <= line["seconds"]
        assert line["peak_memory"] > 1e8
    assert any(line["seconds_saving"] > 0 for line in steps)
    for stage in ("deep", "cut"):
        assert list((workdir / "profile" / stage).rglob("*.xplane.pb"))
    assert "Mesh: {'data': 1, 'fsdp': 1, 'tensor': 1}, attention: xla (auto, cpu)" in output


def test_a_stage_compiles_its_step_once(whole):
    _, _, log = whole
    assert log.count("Finished XLA compilation of jit(step)") == 2  # two stages


def test_a_killed_run_ends_with_the_same_bits(whole, root, tmp_path):
    at = random.randint(1, 7)
    code, _ = interrupt(signal.SIGKILL, at, tmp_path / "run", root)
    assert code == -signal.SIGKILL
    done = run(tmp_path / "run", root)
    assert done.returncode == 0, done.stderr
    expected = weights(whole[0])
    for name, leaf in weights(tmp_path / "run").items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=f"{name}, killed at {at}")


def test_a_run_resumes_on_other_devices(whole, root, tmp_path):
    code, output = interrupt(signal.SIGTERM, 3, tmp_path / "run", root, devices=4)
    assert code == 0, output
    assert output.strip().splitlines()[-1].endswith("rerun the same command to resume")
    mesh = ("--mesh.fsdp", "2", "--mesh.tensor", "2")
    done = run(tmp_path / "run", root, *mesh, devices=8)
    assert done.returncode == 0, done.stderr
    expected = weights(whole[0])
    for name, leaf in weights(tmp_path / "run").items():
        # Adam divides rounding by gradients near zero: 1.4e-5 was seen with jax 0.12.
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=3e-5, err_msg=name)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_queries(root, tmp_path):
    done = run(tmp_path / "run", root, "--stages.deep.optimizer.learning-rate", "1e30")
    assert done.returncode == 2
    assert "error: stage deep, step" in done.stderr
    assert "Queries of this step: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_workdir_of_another_run_is_refused(whole, root):
    done = run(whole[0], root, "--stages.cut.steps", "9")
    assert done.returncode == 2
    assert "differs in stages.cut.steps (8 there, 9 here)" in done.stderr


def test_a_second_process_on_a_workdir_is_refused(whole, root):
    with lock(whole[0]):
        done = run(whole[0], root)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"error: another process writes {whole[0]}: wait until it ends, or stop it"


def test_another_run_reuses_the_stages_that_are_the_same(whole, root, tmp_path):
    """Only the last stage is changed: to one that trains nothing."""
    flags = ("--reuse", str(whole[0]), "--stages.cut.steps", "0")
    done = run(tmp_path / "run", root, *flags)
    assert done.returncode == 0, done.stderr
    assert f"deep: taken from {whole[0]}" in done.stdout
    assert f"cut: not taken from {whole[0]}: it differs in settings.steps (8 there" in done.stdout
    assert "cut: trains nothing" in done.stdout
    deep, cut = (
        load_file(tmp_path / "run" / name / "model.safetensors") for name in ("deep", "cut")
    )
    for name, leaf in load_file(whole[0] / "deep/model.safetensors").items():
        np.testing.assert_array_equal(deep[name], leaf, err_msg=name)
    for name, leaf in cut.items():  # the first layers, as they were
        np.testing.assert_array_equal(leaf, deep[name], err_msg=name)
    assert len(cut) < len(deep)


def test_a_damaged_checkpoint_falls_back_and_ends_with_the_same_bits(whole, root, tmp_path):
    code, output = interrupt(signal.SIGTERM, 5, tmp_path / "run", root)
    assert code == 0, output
    folder = tmp_path / "run/checkpoints/cut"
    *_, before, latest = sorted(int(path.name) for path in folder.glob("[0-9]"))
    damaged = max((folder / str(latest)).rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    done = run(tmp_path / "run", root)
    assert done.returncode == 0, done.stderr
    assert f"step {latest} is damaged" in done.stdout
    assert f"training resumes from step {before}" in done.stdout
    expected = weights(whole[0])
    for name, leaf in weights(tmp_path / "run").items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_a_mistyped_folder_leaves_the_workdir_free(tmp_path):
    done = run(tmp_path / "run", tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == f"error: {tmp_path / 'nowhere'} is not a folder"
    assert not (tmp_path / "run").exists()


def test_the_demo_config_trains_on_a_folder_of_ones_own(root, tmp_path):
    demo = REPOSITORY / "configs/openmoji.py"
    # Steps are for the test's sake; --data.root is all that a user gives.
    few = {"deep": "2", "distil": "2", "pruned": "0"}
    steps = [flag for name in few for flag in (f"--stages.{name}.steps", few[name])]
    done = run(tmp_path / "run", root, *steps, config=demo)
    assert done.returncode == 0, done.stderr
    assert "the data has 13 pairs" in done.stdout
    assert (tmp_path / "run/pruned/model.safetensors").exists()
