"""Every Python block of README and docs runs as it stands, on a small model."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from puma_jax import Embedder
from puma_jax.data import mbeir
from puma_jax.export import __main__ as export
from puma_jax.search.corpus import open_corpus
from puma_jax.search.embedding import embed
from tests.docs.pages import PAGES, ROOT, blocks, languages, name_of
from tests.reference import random_image, save_reranker
from tests.service.serving import serving, small_embedder

WITH_CODE = [page for page in PAGES if blocks(page, "python")]
# What stands for the real thing, which is too large for a test.
SMALL = {"keep_layers(12)": "keep_layers(3)", '"word " * 500': '"word " * 2000'}


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A working directory with all that the pages' commands would have made."""
    here = tmp_path_factory.mktemp("world")
    embedder = Embedder.load(tiny.folder, dtype="float32")
    for stage in ("deep", "pruned"):
        embedder.save(here / "runs/demo-quick" / stage)
    embedder.save(here / "my-puma")
    embedder.save(here / "exported/huggingface")
    folder = here / "runs/openmoji/mbeir_images/openmoji/color"
    folder.mkdir(parents=True)
    for number, name in enumerate(("1F4B0", "1F34E", "1F6B2", "1F3B8")):
        random_image(56, 56, seed=number).save(folder / f"{name}.png")
    mbeir.write_candidates(
        here / "runs/openmoji/cand_pool/local/mbeir_openmoji_task2_cand_pool.jsonl",
        [
            mbeir.Candidate(
                f"10:{name}",
                f"A country, {name}.",
                f"mbeir_images/openmoji/color/{name}.png",
                "image,text",
            )
            for name in ("1F4B0", "1F34E", "1F6B2")
        ],
    )
    embed(open_corpus(folder), embedder, here / "runs/vectors", items_per_shard=3)
    random_image(120, 80).save(here / "bike.jpg")
    save_reranker(here / "reranker")
    metrics = {"stage": "pruned", "step": 10, "loss": 5.5}
    (here / "runs/demo-quick/metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    (here / "mine/photos").mkdir(parents=True)
    (here / "mine/images").mkdir()
    rows = [{"id": n, "image": f"{n}.jpg", "text": f"A bicycle, no. {n}."} for n in "12"]
    (here / "photos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in "12":
        for kind in ("photos", "images"):
            random_image(60, 40, seed=int(n)).save(here / "mine" / kind / f"{n}.jpg")
    shutil.copytree(ROOT / "configs", here / "configs")
    return here


@pytest.fixture
def run_page(world, tiny, monkeypatch):
    """Run the blocks of a page one after the other, and return the names they leave."""
    monkeypatch.chdir(world)
    shutil.rmtree(world / "my-puma", ignore_errors=True)
    shutil.copytree(world / "exported/huggingface", world / "my-puma")

    def run(page, **small):
        names: dict = {"__name__": "page"}
        models = {
            "Qwen/Qwen2-VL-2B-Instruct": str(tiny.folder),
            "Qwen/Qwen3-VL-Reranker-2B": str(world / "reranker"),
        }
        replaced = SMALL | models | small
        for number, code in enumerate(blocks(ROOT / page, "python"), 1):
            if "embedder.save(" in code:
                shutil.rmtree(world / "my-puma")
            for given, other in replaced.items():
                code = code.replace(given, other)
            exec(compile(code, f"{page}, block {number}", "exec"), names)
        return names

    return run


SPECIAL = {"README.md", "docs/data.md", "docs/evaluate.md", "docs/export.md", "docs/serve.md"}
PLAIN = [name_of(page) for page in WITH_CODE if name_of(page) not in SPECIAL]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_is_fenced_by_one_name_so_that_none_is_left_out(page):
    assert languages(page) <= {"python", "sh", ""}


@pytest.mark.parametrize("page", PLAIN)
def test_the_blocks_run(run_page, page):
    run_page(page)


def test_the_readme(run_page, world):
    names = run_page("README.md")
    assert names["vectors"].shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(names["vectors"], axis=1), 1, atol=1e-5)
    assert (world / "my-puma/config.json").exists()
    assert names["embedder"].config.kept_layers == (0, 1, 2)


def test_own_data_is_sound(run_page, world):
    names = run_page("docs/data.md")
    assert names["report"].sound, str(names["report"])
    report = mbeir.validate("mine")
    assert report.sound, str(report)


def test_mteb_runs_our_model(run_page, monkeypatch):
    mteb = pytest.importorskip("mteb", reason="pip install -e '.[mteb]'")
    seen = []

    def evaluate(model, tasks, cache):
        seen.append((model.name, model.revision, [task.metadata.name for task in tasks]))
        return pytest.importorskip("pandas").Series(dtype=float)

    # Tasks are downloaded: tests/evaluation/test_mteb.py runs mteb's own evaluation on made data.
    monkeypatch.setattr(mteb, "evaluate", evaluate)
    run_page("docs/evaluate.md", **{"results.to_dataframe()": "results"})
    assert seen == [("me/my-puma", "step-3000", ["NanoSciFactRetrieval", "NIGHTSI2IRetrieval"])]


def test_a_client_gets_a_vector_of_the_service(run_page, tiny):
    with serving(small_embedder(tiny.folder), None, name="mac") as live:
        names = run_page("docs/serve.md", **{"http://127.0.0.1:8000": live.url})
        names["client"].close()
    assert len(names["vector"]) == 64


def test_exports_give_the_vectors_of_the_embedder(world, no_videos, monkeypatch):
    monkeypatch.chdir(world)
    for kind in ("stablehlo", "sentence-transformers"):
        export.main(kind, "runs/demo-quick/pruned", world / "exported" / kind)
    stablehlo, sentence, transformers = blocks(ROOT / "docs/export.md", "python")
    lines = stablehlo.rstrip().splitlines()
    assert "word" in lines[-1]
    # The loader is another module named `load`: it runs in a process of its own.
    code = "\n".join(lines[:-1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[")
    exec(sentence, {})
    names: dict = {}
    exec(transformers, names)
    embedder = Embedder.load("exported/huggingface", dtype="float32")
    encode = functools.partial(embedder.encode, progress=False)
    query = encode([{"text": "a red bicycle"}], instruction="Find an image that matches.")
    document = encode([{"image": Image.open("bike.jpg")}])
    np.testing.assert_allclose(names["query"].numpy(), query[0], atol=2e-6)
    np.testing.assert_allclose(names["document"].numpy(), document[0], atol=2e-6)
