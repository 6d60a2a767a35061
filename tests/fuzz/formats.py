"""Every kind of file that puma_jax reads, as `python -m tests.fuzz` damages it.

A builder makes a small sound file in an empty folder, and says what reads it. Packages are imported
where they are used: the process of one kind imports no more than it needs.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from puma_jax import Embedder
from puma_jax.files import as_json
from tests import reference
from tests.data import fake_mbeir
from tests.fuzz import Target

Build = Callable[[Path], Target]

TEXTS = ("a red bicycle", "Größe 漢", "ends.", "<|im_end|>", "two\nlines")


def model(folder: Path) -> Path:
    """Write a random model as this package saves it, in several files of weights."""
    reference.save_folder(reference.random_model(reference.qwen2_vl_config()), folder / "base")
    saved = folder / "model"
    Embedder.load(folder / "base", dtype=None).keep_layers(2).save(saved, max_shard_bytes=100_000)
    return saved


def of_model(name: str) -> Build:
    """Return a builder of a file in a model's folder."""

    def build(folder: Path) -> Target:
        saved = model(folder)
        name_of_file = next(path.name for path in sorted(saved.glob(name)))
        return Target(
            saved / name_of_file,
            lambda: Embedder.load(saved, dtype="float32").preprocess({"text": TEXTS[1]}),
        )

    return build


def weights(folder: Path) -> Target:
    """A file of weights, all of which are read."""
    saved = model(folder)
    path = sorted(saved.glob("*.safetensors"))[0]
    return Target(path, lambda: Embedder.load(saved, dtype="float32").fingerprint)


def of_adapter(name: str) -> Build:
    """Return a builder of a file of an adapter, as a stage of training writes it."""

    def build(folder: Path) -> Target:
        import jax

        from puma_jax.config import LoraConfig
        from puma_jax.model.lora import add_lora, is_lora
        from puma_jax.model.tree import partition
        from puma_jax.training.adapter import write_adapter
        from puma_jax.training.config import StageConfig

        embedder = Embedder.load(model(folder), dtype="float32")
        lora = LoraConfig(rank=2, targets=("query",))
        adapted = add_lora(embedder.params, lora, jax.random.key(0))
        leaves, _ = partition(adapted, is_lora)
        stage = StageConfig(steps=1, lora=lora)
        write_adapter(folder / "adapter", embedder.config, leaves, stage, "base")
        return Target(
            folder / "adapter" / name,
            lambda: (
                Embedder.load(
                    folder / "model", dtype="float32", adapter=folder / "adapter"
                ).fingerprint
            ),
        )

    return build


def of_vectors(name: str) -> Build:
    """Return a builder of a file in a folder of vectors, read by search."""

    def build(folder: Path) -> Target:
        from puma_jax.search.shards import Vectors

        out, _ = embedded(folder)

        def read() -> None:
            vectors = Vectors(out, verify=True)
            assert sum(len(part) for part in vectors.parts()) == len(vectors)
            vectors.ids(range(len(vectors)))

        return Target(sorted(out.glob(name))[0], read)

    return build


def of_resume(name: str) -> Build:
    """Return a builder of a file in a folder of vectors, read by the job that resumes it."""

    def build(folder: Path) -> Target:
        whole, embed = embedded(folder)

        def resume() -> None:
            shutil.rmtree(folder / "copy", ignore_errors=True)
            embed(shutil.copytree(whole, folder / "copy"))

        return Target(sorted(whole.glob(name))[0], resume)

    return build


def embedded(folder: Path) -> tuple[Path, Callable[[Path], None]]:
    """Embed a small corpus; return the folder of vectors, and what embeds it into another."""
    from puma_jax import embed

    corpus, out, saved = folder / "corpus.jsonl", folder / "vectors", model(folder)
    lines = [json.dumps({"id": f"x:{number}", "text": text}) for number, text in enumerate(TEXTS)]
    corpus.write_text("\n".join(lines) + "\n", "utf-8")
    into = functools.partial(embed.main, str(saved), corpus, items_per_shard=2)
    into(out)
    return out, into


def of_corpus(suffix: str) -> Build:
    """Return a builder of a file of items to embed, all of which are read."""

    def build(folder: Path) -> Target:
        from puma_jax.search.corpus import open_corpus

        rows = [
            {"id": f"x:{number}", "text": text, "price": number, "sold": number % 2 == 0}
            for number, text in enumerate(TEXTS)
        ]
        path = folder / f"items{suffix}"
        if suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif suffix == ".csv":
            with open(path, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def read() -> None:
            corpus = open_corpus(path)
            for number in range(corpus.items):
                corpus.read(number)

        return Target(path, read)

    return build


def results(folder: Path) -> Target:
    """The results of an evaluation."""
    from puma_jax.evaluation.report import Evaluation, SetResult
    from puma_jax.evaluation.results import read_evaluations

    rates = {"local": {5: 0.5}, "global": {5: 0.25}}
    intervals = {"local": (0.1, 0.2), "global": (0.1, 0.2)}
    found = SetResult("cirr", 7, 20, 30, 5, rates, intervals, {1: 0.25})
    path = folder / "results.json"
    path.write_text(as_json(Evaluation("test", 99, (found,)).to_json()))
    return Target(path, lambda: [found.table() for found in read_evaluations(path).values()])


def of_run(name: str) -> Build:
    """Return a builder of a file in the workdir of a training run, read by an export."""

    def build(folder: Path) -> Target:
        from puma_jax.export.card import training_of
        from tests.training import tiny_run

        evaluation = json.loads(results(folder).path.read_bytes())
        (folder / "config.json").write_text(as_json(dataclasses.asdict(tiny_run.get_config())))
        stages = {"cut": {"evaluation": evaluation}}
        (folder / "results.json").write_text(as_json({"stages": stages}))
        return Target(folder / name, lambda: training_of(folder / "cut"))

    return build


def workdir(folder: Path) -> Target:
    """The config of a training run, read by the run that resumes it."""
    from puma_jax.training.workdir import CONFIG_FILE, claim_run
    from tests.training import tiny_run

    run, config = folder / "run", tiny_run.get_config()
    claim_run(run, config)
    return Target(run / CONFIG_FILE, lambda: claim_run(run, config))


def of_stablehlo(name: str) -> Build:
    """Return a builder of a file of an export, read by its loader."""

    def build(folder: Path) -> Target:
        from puma_jax.export import loader, stablehlo

        out = folder / "exported"
        out.mkdir()
        stablehlo.write(Embedder.load(model(folder), dtype="float32"), out)
        return Target(out / name, lambda: loader.Embedder(out), ValueError)

    return build


def of_data(name: str) -> Build:
    """Return a builder of a file of built training data."""

    def build(folder: Path) -> Target:
        from puma_jax.data.builder import Settings
        from puma_jax.data.builder import build as build_data
        from puma_jax.data.prompts import Processor
        from puma_jax.data.store import Store

        root, out = fake_mbeir.write_union(folder / "mbeir"), folder / "built"
        saved = Embedder.load(model(folder), dtype="float32")
        processor = Processor(saved.tokenizer, saved.config)
        build_data(Settings(root, out, shard_items=5, workers=1), processor)

        def read() -> None:
            store = Store.open(out)
            _ = store.table.query_tokens.sum(), store.instructions
            for row in range(len(store.table.query_tokens)):
                store.query(row)

        return Target(next(iter(sorted(out.glob(name)))), read)

    return build


def of_benchmark(name: str) -> Build:
    """Return a builder of a file of a benchmark, read by its validation."""

    def build(folder: Path) -> Target:
        from puma_jax.data.mbeir.validation import validate

        root = fake_mbeir.write_test_sets(folder / "mbeir")
        path = sorted(root.glob(name))[0]
        return Target(path, lambda: validate(root, check_images=False))

    return build


def teacher_cache(folder: Path) -> Target:
    """The notes of a teacher's cache, read by the run that resumes it."""
    from puma_jax.data.builder import Settings
    from puma_jax.data.builder import build as build_data
    from puma_jax.data.prompts import Processor
    from puma_jax.data.store import Store
    from tests.training.test_cache import IMAGES, Case

    pair = reference.pair(reference.qwen2_vl_config(), folder / "model")
    config = dataclasses.replace(pair.config, images=IMAGES)
    root = fake_mbeir.write_union(folder / "mbeir")
    build_data(
        Settings(root, folder / "built", workers=1), Processor(pair.processor.tokenizer, config)
    )
    case = Case(Store.open(folder / "built"), config, pair.params)
    case.build(folder / "whole")
    shutil.copytree(folder / "whole", folder / "cache")
    return Target(
        sorted((folder / "cache").glob("*.json"))[0], lambda: case.build(folder / "cache")
    )


FORMATS: dict[str, Build] = {
    "model config": of_model("config.json"),
    "model index": of_model("model.safetensors.index.json"),
    "model images": of_model("preprocessor_config.json"),
    "model weights": weights,
    "adapter config": of_adapter("adapter_config.json"),
    "adapter model": of_adapter("puma_jax.json"),
    "adapter weights": of_adapter("adapter_model.safetensors"),
    "tokenizer": of_model("tokenizer.json"),
    "tokenizer config": of_model("tokenizer_config.json"),
    "benchmark queries": of_benchmark("query/**/*.jsonl"),
    "benchmark pool": of_benchmark("cand_pool/**/*.jsonl"),
    "benchmark judgments": of_benchmark("qrels/**/*.txt"),
    "built data": of_data("build.json"),
    "built instructions": of_data("instructions.json"),
    "built table": of_data("table/*.npy"),
    "vectors manifest": of_vectors("manifest.json"),
    "vectors": of_vectors("*/vectors.safetensors"),
    "vectors ids": of_vectors("*/ids.txt"),
    "embed job": of_resume("job.json"),
    "embed shard": of_resume("*/shard.json"),
    "embed items": of_resume("*/items.jsonl"),
    "corpus lines": of_corpus(".jsonl"),
    "corpus csv": of_corpus(".csv"),
    "corpus parquet": of_corpus(".parquet"),
    "results": results,
    "workdir": workdir,
    "run config": of_run("config.json"),
    "run results": of_run("results.json"),
    "teacher cache": teacher_cache,
    "export manifest": of_stablehlo("manifest.json"),
    "export tokenizer": of_stablehlo("tokenizer.json"),
}
