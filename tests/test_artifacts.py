"""What a job writes is whole, is its own, and survives."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from puma_jax.artifacts import (
    atomic_file,
    atomic_folder,
    check_output,
    claim,
    is_partial,
    lock,
    write_json,
)
from puma_jax.errors import ArtifactError, CheckpointError
from puma_jax.files import Digest, parse_json, read_json


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path: Path):
    path = tmp_path / "below" / "file.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        with atomic_file(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_a_folder_appears_whole(tmp_path: Path):
    with atomic_folder(tmp_path / "a" / "out") as partial:
        (partial / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["out"]


def test_an_empty_folder_is_filled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    number = tmp_path.stat().st_ino
    monkeypatch.chdir(tmp_path)
    with atomic_folder(Path()) as partial:
        (partial / "below").mkdir()
        (partial / "below" / "x").write_text("1")
    assert tmp_path.stat().st_ino == number
    assert [path.name for path in tmp_path.iterdir()] == ["below"]
    assert (tmp_path / "below" / "x").read_text() == "1"


def test_what_a_user_named_like_ours_is_left_alone(tmp_path: Path):
    for name in ("out.partial", "out.unfinished", ".out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
    for name in ("out.partial", "out.unfinished", ".out.partial"):
        assert (tmp_path / name / "precious").read_text() == "mine"


@pytest.mark.parametrize("where", ["full", "file", "file/below"])
def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path, where: str):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"choose another|cannot be written"):
        check_output(tmp_path / where)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_a_read_only_place_is_refused_even_to_root():
    with pytest.raises(ArtifactError, match=r"/proc/self/out cannot be written"):
        check_output(Path("/proc/self/out"))


def test_a_folder_is_its_jobs_by_content(tmp_path: Path):
    folder, calls = tmp_path / "job", []

    def shape() -> int:
        calls.append(1)
        return len(calls)

    job = {"model": "m", "nested": {"a": 1, "b": [1, 2]}, "how": 1}
    first = claim(folder, "job.json", job, what="vectors", adopt={"shape": shape})
    again = claim(
        folder,
        "job.json",
        job | {"how": 2},
        what="vectors",
        adopt={"shape": shape},
        may_differ=("how",),
    )
    assert first == again
    assert first["shape"] == 1
    assert calls == [1]
    with pytest.raises(ArtifactError, match=r"differs in nested\.a \(1 there, 2 here\)"):
        claim(
            folder,
            "job.json",
            job | {"nested": {"a": 2, "b": [1, 2]}},
            what="vectors",
            adopt={"shape": shape},
        )
    with pytest.raises(ArtifactError, match=r"differs in nested\.c \(null there, 3 here\)"):
        claim(
            folder,
            "job.json",
            job | {"nested": {"a": 1, "b": [1, 2], "c": 3}},
            what="vectors",
            adopt={"shape": shape},
        )


def test_a_field_that_is_no_more_makes_another_job(tmp_path: Path):
    claim(tmp_path, "job.json", {"a": 1, "old": 2}, what="vectors")
    with pytest.raises(ArtifactError, match=r"differs in old \(2 there, null here\)"):
        claim(tmp_path, "job.json", {"a": 1}, what="vectors")


def test_a_folder_with_something_else_is_not_claimed(tmp_path: Path):
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(ArtifactError, match="is not empty and holds no vectors"):
        claim(tmp_path, "job.json", {}, what="vectors")
    with pytest.raises(ArtifactError, match="is a file"):
        claim(tmp_path / "photo.jpg", "job.json", {}, what="vectors")


def test_of_many_that_claim_at_once_all_agree(tmp_path: Path):
    def one(number: int) -> dict:
        return claim(tmp_path / "job", "job.json", {"a": 1}, what="x", adopt={"n": lambda: number})

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, range(64)))
    assert all(each == found[0] for each in found)
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["job.json"]


def test_a_second_process_is_kept_out_until_the_first_is_killed(tmp_path: Path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from puma_jax.artifacts import lock\n"
            "with lock(Path(sys.argv[1])):\n"
            "    Path(sys.argv[1], '.x.0123456789abcdef.partial').mkdir()\n"
            "    print('held', flush=True); time.sleep(600)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match="another process writes"), lock(tmp_path):
            pass
        with lock(tmp_path, "part-1"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    for _ in range(100):  # the kernel lets go of the lock as the process is buried
        try:
            with lock(tmp_path):
                assert not [path for path in tmp_path.iterdir() if is_partial(path)]
            break
        except ArtifactError:
            time.sleep(0.05)
    else:
        pytest.fail("the lock outlives its process")


def test_what_a_killed_process_left_is_removed_and_what_lives_is_not(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from puma_jax.artifacts import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'x').write_text('1'); print('writing', flush=True); time.sleep(600)"
    )
    out = tmp_path / "out"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.stdout.close()
    processes[0].kill()
    processes[0].wait()
    with atomic_folder(out):
        left = [path for path in tmp_path.iterdir() if is_partial(path)]
        assert len(left) == 2  # ours, and that of the process that lives
    processes[1].kill()
    processes[1].wait()


def test_the_second_of_two_writers_does_not_mix_with_the_first(tmp_path: Path):
    def write_twice() -> None:
        with atomic_folder(tmp_path / "out") as mine:
            (mine / "mine").write_text("")
            with atomic_folder(tmp_path / "out") as others:
                (others / "others").write_text("")

    with pytest.raises(ArtifactError, match="is not empty"):
        write_twice()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["others"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not readable JSON"),
        (b"[1]", "expected an object"),
        (b'{"a": 1, "a": 2}', 'key "a" is given twice'),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"\xff", "0xff, is not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not readable JSON"),
    ],
)
def test_json_that_cannot_be_read_is_named_in_one_line(
    tmp_path: Path, content: bytes, message: str
):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_json(path, error=CheckpointError)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_value():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_a_digest_follows_the_content(tmp_path: Path):
    path = tmp_path / "x"
    path.write_text("one")
    first = Digest.of(path)
    assert Digest.of(path, first) is first
    path.write_text("two")
    os.utime(path, ns=(0, first.modified_ns + 1))
    assert Digest.of(path, first).sha256 != first.sha256
    path.write_text("one")
    os.utime(path, ns=(0, first.modified_ns + 2))
    assert Digest.of(path, first).sha256 == first.sha256
