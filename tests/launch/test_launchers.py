"""Launchers print exactly what they would run, lint clean, and treat signals as they say.

A file in golden/ is a transcript: commands after "$", what each prints, and "exit N" if it fails.
"""

import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
DOCKERFILES = sorted(LAUNCH.glob("Dockerfile.*"))
SETTINGS = sorted((LAUNCH / "env").glob("*.env"))


def start(command, **environment):
    """Start a command of words in the repository; its output is text."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env={**kept, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Return exit code, output and errors."""
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def wait_for(path, text=""):
    """Return what a file holds, as soon as it holds the text."""
    until = time.monotonic() + 30
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < until, f"{path} never held {text!r}"
        time.sleep(0.02)
    return path.read_text()


def stub(folder, name, body):
    """Write a command that stands in for one of a cluster."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """PATH with clients of clusters that only note that they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcloud", "xpk", "srun", "scancel", "scontrol", "nvidia-smi", "git"):
        stub(folder, name, f'echo "{name} $*" >>{tmp_path}/called')
    return f"{folder}:{os.environ['PATH']}"


def tool(name):
    """Return a linter of the virtual environment."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip(f"there is no {name} for this platform")
    return found


def lines_of(path):
    """Return the settings in a file."""
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.txt")))
def test_a_dry_run_prints_the_commands_and_runs_none(name, cluster, tmp_path):
    expected = (GOLDEN / f"{name}.txt").read_text()
    transcript = []
    for line in expected.splitlines():
        if line.startswith("$ "):
            words = shlex.split(line[2:])
            process = start(["env", *words], PATH=cluster, TMPDIR="/tmp")
            code, output, errors = finish(process)
            ending = f"exit {code}\n" if code else ""
            transcript.append(f"{line}\n{output}{errors}{ending}")
    found = "\n".join(transcript).replace(str(REPOSITORY), "REPOSITORY")
    assert found == expected
    assert not (tmp_path / "called").exists()


def test_what_is_printed_is_what_is_run(cluster, tmp_path):
    command = [LAUNCH / "tpu_vm.sh", "--zone", "z", "--share", "h:/a b"]
    for verb in (["create"], ["setup"], ["run", "python", "-c", "print('a  b')"], ["delete"]):
        _, printed, _ = finish(start([*command, "--dry-run", *verb], PATH=cluster))
        assert finish(start([*command, *verb], PATH=cluster))[0] == 0
        called = (tmp_path / "called").read_text()
        (tmp_path / "called").unlink()
        words = [" ".join(shlex.split(line)) for line in printed.splitlines()]
        assert called.splitlines() == words


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean_for_shellcheck(script):
    code, output, _ = finish(start([tool("shellcheck"), script]))
    assert code == 0, output
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_lint_clean_and_not_of_root(file):
    text = file.read_text()
    assert re.findall("^FROM (.*)", text, re.M) == ["python:3.12-slim-bookworm"]
    arguments = dict(re.findall("^ARG (.*)=(.*)", text, re.M))
    assert int(string.Template(re.findall("^USER (.*)", text, re.M)[-1]).substitute(arguments)) > 0
    assert text.count("pip install") == text.count("--no-cache-dir")
    allowed = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for sources in re.findall("^COPY (.*) ", text, re.M):
        for source in sources.split():
            assert f"!{source}" in allowed
            assert (REPOSITORY / source).exists()
    code, output, _ = finish(start([tool("hadolint"), file]))
    assert code == 0, output


def test_the_jobset_is_one():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    exported = " ".join(re.findall("^#   export (.*)", text, re.M))
    values = dict(word.split("=", 1) for word in shlex.split(exported))
    manifest = yaml.safe_load(string.Template(text).substitute(values))
    schema = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())
    jsonschema.validate(manifest, schema)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    words = shlex.split(container["args"][0])
    assert words[:3] == ["exec", "launch/entrypoint.sh", "python"]
    assert words[-1] == "--distributed.auto"
    manifest["spec"]["failurePolicy"] = {"maxRestart": 1}
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(manifest, schema)


@pytest.mark.parametrize("file", SETTINGS, ids=lambda path: path.name)
def test_every_setting_has_a_reason(file):
    before = ""
    for line in file.read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[A-Z][A-Z0-9_]*=[^\s'\"$]+", line), "not readable for all"
            assert before.startswith("# "), f"{line} has no comment above it"
        before = line


def test_xla_knows_the_flags():
    flags = [line.partition("=") for file in SETTINGS for line in lines_of(file)]
    all_flags = " ".join(value for name, _, value in flags if name == "XLA_FLAGS")
    assert all_flags.count("--xla") >= 2
    command = [sys.executable, "-c", "import jax; print(len(jax.devices()))"]
    code, output, errors = finish(start(command, XLA_FLAGS=all_flags))  # aborts if it does not
    assert (code, output) == (0, "2\n"), errors


WORDS = """
import signal, sys, time
number = sys.argv[-1]
print("arguments", *sys.argv[1:], flush=True)
print("to stderr", file=sys.stderr, flush=True)
"""


def multiprocess(count, code, **environment):
    command = [LAUNCH / "local_multiprocess.sh", count, sys.executable, "-c", WORDS + code]
    return start(command, PORT="1234", **environment)


def test_each_process_knows_its_number_and_is_known_by_it():
    code, output, errors = finish(multiprocess(3, ""))
    assert code == 0
    for number in range(3):
        flags = "--distributed.coordinator localhost:1234 --distributed.processes 3"
        line = f"[{number}] arguments {flags} --distributed.process {number}"
        assert line in output.splitlines()
        assert f"[{number}] to stderr" in errors.splitlines()
    assert len(output.splitlines()) == 3


def test_one_that_fails_ends_the_others_with_its_code():
    # 0 fails, 1 would sleep for long, 2 does not listen to SIGTERM
    body = """
if number == "2":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
time.sleep(1 if number == "0" else 50)
sys.exit(7)
"""
    before = time.monotonic()
    code, output, errors = finish(multiprocess(3, body, GRACE_S="0.5"))
    assert code == 7
    assert "process 0 failed with 7" in errors
    assert "[2] deaf" in output
    assert time.monotonic() - before < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_processes_once_and_their_last_words_us(number, tmp_path):
    body = f"""
from pathlib import Path
got = []
for each in (signal.SIGTERM, signal.SIGINT):
    signal.signal(each, lambda number, frame: got.append(number))
Path({str(tmp_path)!r}, number).touch()
while not got:
    time.sleep(0.01)
time.sleep(0.2)
print("saved after", *map(int, got), flush=True)
"""
    process = multiprocess(2, body)
    wait_for(tmp_path / "0")
    wait_for(tmp_path / "1")
    process.send_signal(number)
    code, output, errors = finish(process)
    assert code == 0, errors
    assert f"[0] saved after {int(number)}\n" in output
    assert f"[1] saved after {int(number)}\n" in output


PATIENT = """
import signal, sys, time
from pathlib import Path
got = []
signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
Path(sys.argv[1]).write_text("up")
while not got:
    time.sleep(0.01)
print("saved", flush=True)
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(("ends_with", "expected"), [(0, 143), (3, 3)])
def test_a_container_that_was_asked_to_stop_is_not_done(ends_with, expected, tmp_path):
    command = [sys.executable, "-c", PATIENT, tmp_path / "up", ends_with]
    process = start([LAUNCH / "entrypoint.sh", *command])
    wait_for(tmp_path / "up", "up")
    process.send_signal(signal.SIGTERM)
    code, output, errors = finish(process)
    assert (code, output) == (expected, "saved\n")
    assert f"ended with {expected}" in errors


def test_a_container_ends_as_its_command():
    for code in (0, 5):
        command = [LAUNCH / "entrypoint.sh", "bash", "-c", f"exit {code}"]
        assert finish(start(command))[0] == code


@pytest.mark.parametrize("ends_with", [0, 3])
def test_slurm_saves_before_the_limit_and_queues_again_unless_it_failed(
    ends_with, cluster, tmp_path
):
    folder = tmp_path / "bin"
    # srun as it is: SIGTERM to it kills its tasks; scancel --signal reaches the tasks
    stub(
        folder,
        "srun",
        f"""trap 'kill -KILL $task; echo "srun killed its tasks" >>{tmp_path}/called' TERM
        while [[ $1 == --* ]]; do shift; done
        "$@" & task=$!
        echo $task >{tmp_path}/task; wait $task; exit $?""",
    )
    # The tasks end before scancel does.
    ending = f"kill $(<{tmp_path}/task); sleep 0.5"
    stub(folder, "scancel", f'echo "scancel $*" >>{tmp_path}/called; {ending}')
    command = [sys.executable, "-c", PATIENT, tmp_path / "up", ends_with]
    process = start(["bash", LAUNCH / "slurm.sbatch", *command], PATH=cluster, SLURM_JOB_ID="17")
    wait_for(tmp_path / "up", "up")
    process.send_signal(signal.SIGUSR1)
    code, output, _ = finish(process)
    assert code == ends_with
    assert "saved" in output
    again = [] if ends_with else ["scontrol requeue 17"]
    called = (tmp_path / "called").read_text().splitlines()
    assert called == ["scancel --signal=TERM 17", *again]


def test_a_slurm_job_that_is_done_is_not_queued_again(cluster, tmp_path):
    script = LAUNCH / "slurm.sbatch"
    code, _, _ = finish(start(["bash", script, "true"], PATH=cluster, SLURM_JOB_ID="17"))
    assert code == 0
    (called,) = (tmp_path / "called").read_text().splitlines()
    assert called.startswith("srun ")


def test_what_is_detached_goes_on_alone_and_stops_when_asked(tmp_path):
    detached, log = LAUNCH / "detached.sh", tmp_path / "run/log"
    command = [sys.executable, "-c", PATIENT, tmp_path / "up", 0]

    def call(*words):
        return finish(start([detached, *words], RUN_DIR=str(tmp_path / "run")))

    assert call("start", *command)[0] == 0
    wait_for(tmp_path / "up", "up")
    assert "runs" in call("status")[1]
    code, _, errors = call("start", *command)
    assert code == 2
    assert "still runs" in errors
    assert "asked to stop" in call("stop")[1]
    assert "saved" in wait_for(log, "ended with 143")
    until = time.monotonic() + 30
    while "nothing runs; ended with 143" not in call("status")[1]:
        assert time.monotonic() < until


def boot():
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_of(process):
    """Return when a process was started, in clock ticks of the boot."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]


@pytest.mark.parametrize(
    "stale",
    [
        lambda process: f"{process.pid}",  # of a number that is used again
        lambda process: f"{process.pid} 1 {boot()}",
        lambda process: f"{process.pid} {start_of(process)} {boot()}",  # another command
        lambda process: f"{process.pid} {start_of(process)} another-boot",
        lambda process: "-1 1 1",  # all processes, to kill
        lambda process: "0",
        lambda process: f"{process.pid} $(exit) x; y",
        lambda process: "",
        lambda process: "\0\n",
    ],
)
def test_a_process_that_it_did_not_start_is_not_stopped(stale, tmp_path):
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "pid").write_text(stale(stranger) + "\n")
        for word in ("stop", "status"):
            _, output, _ = finish(start([LAUNCH / "detached.sh", word], RUN_DIR=str(tmp_path)))
            assert "nothing runs" in output
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_the_database_is_open_to_this_machine_alone_and_its_versions_are_fixed():
    services = yaml.safe_load((LAUNCH / "milvus.compose.yaml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:19530:19530"]
    for service in services.values():
        name, _, version = service["image"].rpartition(":")
        assert name
        assert version != "latest"
    waits = services["milvus"]["depends_on"]
    assert all("healthcheck" in services[name] for name in waits)
