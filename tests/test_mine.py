"""`python -m puma_jax.mine`: a benchmark to train on, the same after a kill, nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puma_jax import mine
from puma_jax.data import mbeir
from puma_jax.errors import ArtifactError, ConfigError
from puma_jax.evaluation.mining import MiningConfig
from tests.data import fake_mbeir
from tests.processes import environment

MINING = MiningConfig(ranks=(1, 6), negatives=3, margin=1.0)
QUERIES = fake_mbeir.UNION_QUERIES


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fake_mbeir.write_union(tmp_path_factory.mktemp("mbeir"))


@pytest.fixture(scope="module")
def whole(tiny, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("mined") / "out"
    mine.main(str(tiny.folder), root, out, MINING)
    return out


def test_the_result_is_the_benchmark_with_other_negatives(root, whole):
    assert mbeir.validate(whole).sound
    before, after = (list(mbeir.read_queries(at / QUERIES)) for at in (root, whole))
    pool = {candidate.did for candidate in fake_mbeir.candidates()}
    for old, new in zip(before, after, strict=True):
        assert (new.qid, new.text, new.image, new.positives) == (
            old.qid,
            old.text,
            old.image,
            old.positives,
        )
        assert len(new.negatives) <= 3
        assert set(new.negatives) <= pool - set(new.positives)
    assert any(new.negatives for new in after)
    for path in (path for path in root.rglob("*") if path.is_file()):
        copy = whole / path.relative_to(root)
        if path != root / QUERIES:
            assert os.path.samefile(path, copy)
    assert json.loads((whole / mine.MANIFEST).read_text())["ranks"] == [1, 6]


def test_fields_that_are_not_of_the_layout_stay(tiny, root, tmp_path):
    mine_root = shutil.copytree(root, tmp_path / "root")
    lines = (mine_root / QUERIES).read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"note": "söme"}, ensure_ascii=False)
    (mine_root / QUERIES).write_text("\n".join([*lines, "{}"]))
    mine.main(str(tiny.folder), mine_root, tmp_path / "out", MINING, on_bad_record="skip")
    written = (tmp_path / "out" / QUERIES).read_text().splitlines()
    assert json.loads(written[0])["note"] == "söme"
    assert written[-1] == "{}"
    assert len(written) == len(lines) + 1


def test_what_was_mined_and_left_out_is_said(tiny, root, tmp_path, capsys):
    mine.main(str(tiny.folder), root, tmp_path / "out", MINING)
    lines = capsys.readouterr().out.splitlines()
    assert any("hard negatives of " in line and "13 queries" in line for line in lines)
    assert lines[-1] == f"Train with --data.root {tmp_path / 'out'} and plan.hard_negatives above 0"


def test_a_killed_run_resumes_and_ends_with_the_same_files(tiny, root, whole, tmp_path):
    out, vectors = tmp_path / "out", tmp_path / "vectors"
    script = tmp_path / "small_batches.py"
    script.write_text(
        "from puma_jax import cli, mine\nfrom puma_jax.evaluation import encoding\n"
        "encoding._ITEMS_AT_ONCE = 5\ncli.run(mine.main)\n"
    )
    command = [
        *(sys.executable, str(script), "--model", str(tiny.folder), "--data.root", str(root)),
        *("--out", str(out), "--ranks", "1", "6", "--negatives", "3", "--margin", "1.0"),
        *("--vectors-dir", str(vectors)),
    ]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE)
    while process.poll() is None and not list(vectors.rglob("*.npy")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vectors are those of an interrupted run" in done.stdout
    assert (out / QUERIES).read_bytes() == (whole / QUERIES).read_bytes()
    assert not list(vectors.rglob("*.npy"))


@pytest.mark.parametrize(
    ("out", "vectors", "message"),
    [
        ("root/out", None, r"out .*root/out lies in .*root: choose a folder outside of it"),
        ("out", "root/vectors", r"vectors_dir .* lies in .*root: choose"),
        ("out", "out/vectors", r"vectors_dir .* lies in .*out: choose"),
    ],
)
def test_folders_within_each_other_are_refused(tmp_path, out, vectors, message):
    with pytest.raises(ConfigError, match=message):
        mine.main(
            "no model",
            tmp_path / "root",
            tmp_path / out,
            vectors_dir=vectors and tmp_path / vectors,
        )


def test_a_folder_with_content_is_refused_before_a_model_is_sought(root, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ArtifactError, match="is not empty"):
        mine.main("no model", root, tmp_path)


def test_other_file_systems_get_copies(tiny, root, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refused)
    mine.main(str(tiny.folder), root, tmp_path / "out", MINING)
    pool = Path(fake_mbeir.UNION_POOL)
    assert (tmp_path / "out" / pool).read_bytes() == (root / pool).read_bytes()
    assert not os.path.samefile(tmp_path / "out" / pool, root / pool)
