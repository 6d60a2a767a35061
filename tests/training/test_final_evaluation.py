"""The evaluation that ends a stage skips what its training skips."""

import dataclasses
from pathlib import Path

import pytest

from puma_jax import Embedder
from puma_jax.errors import DataError
from puma_jax.evaluation.report import Evaluation
from puma_jax.train import load_config
from puma_jax.training import results
from tests.evaluation.small import document, write_set
from tests.reference import random_image


def test_a_broken_picture_that_training_skips_is_skipped_and_counted(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(results, "_MEASURED_ITEMS", 8)
    monkeypatch.setattr(results, "finished_model", lambda workdir, name: "digest")
    root = tmp_path / "benchmark"
    (root / "images").mkdir(parents=True)
    for n in range(4):
        random_image(56, 56, n).save(root / f"images/{n}.png")
    (root / "images/1.png").write_bytes(b"not a picture")
    pool = [document(f"d:{n}", image=f"images/{n}.png") for n in range(4)]
    write_set(root, "mine", 0, {"q:1": ("a picture", ["d:2"])}, pool)
    Embedder.load(tiny.folder, dtype=None).save(tmp_path / "run/cut")
    config = load_config(Path(__file__).with_name("tiny_run.py"))()
    data = dataclasses.replace(config.data, root=root, on_bad_record="skip")
    config = dataclasses.replace(config, data=data)
    result = results.stage_result("cut", config, tmp_path / "run")
    found = Evaluation.from_json(result["evaluation"])
    assert (found.skipped, found.documents) == (1, 3)
    assert "1 documents of local pools cannot be read and are left out" in capsys.readouterr().out
    strict = dataclasses.replace(config, data=dataclasses.replace(data, on_bad_record="error"))
    (tmp_path / "run/results/cut/result.json").unlink()
    with pytest.raises(DataError, match=r'cand_pool.jsonl:2: document "d:1": '):
        results.stage_result("cut", strict, tmp_path / "run")
