"""`verify` is green for good exports and services, and red once a folder is changed by hand."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from puma_jax import Embedder
from puma_jax import verify as entry_point
from puma_jax.config import ImageConfig, PromptConfig
from puma_jax.errors import ArtifactError, ConfigError
from puma_jax.export import engines, golden
from puma_jax.export.__main__ import main as export
from puma_jax.export.agreement import Agreement, kind_of, table
from tests import reference
from tests.service.serving import serving

KINDS = ("huggingface", "sentence-transformers", "stablehlo")

pytestmark = pytest.mark.usefixtures("no_videos")


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A model folder with small limits."""
    folder = tmp_path_factory.mktemp("verified") / "model"
    prompt = PromptConfig(max_text_tokens=150)
    images = ImageConfig(4 * 28**2, 30 * 28**2)
    Embedder.load(tiny.folder, dtype="float32", images=images, prompt=prompt).save(folder)
    return folder


@pytest.fixture(scope="module")
def exports(model):
    folders = {kind: model.with_name(kind) for kind in KINDS}
    for kind, folder in folders.items():
        export(kind, str(model), folder)
    return folders


@pytest.fixture(scope="module")
def agreement(model):
    return Agreement(Embedder.load(model, dtype="float32"), "float32")


def by_engine(checks):
    return {check.engine.partition(",")[0]: check for check in checks}


def test_good_exports_are_equal_and_the_card_says_so(model, exports, capsys):
    folders = tuple(exports.values())
    entry_point.main(str(model), folders, update_cards=True)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == 3 + 3 + 3 + 2  # puma_jax and transformers, then the exports in turn
    assert all("equal |" in line for line in lines), out
    assert f"StableHLO, {exports['stablehlo']}: without special tokens, long text" in out
    for folder in folders:
        card = (folder / "README.md").read_text()
        assert card.count("## Verification") == card.count("## License") == 1
        assert lines[-1] in card
    entry_point.main(str(model), folders[:1], update_cards=True)
    assert (folders[0] / "README.md").read_text().count("## Verification") == 1
    assert lines[-1] not in (folders[0] / "README.md").read_text()


def edited(folder, name, edit):
    """Change a JSON file of a folder."""
    path = folder / name
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def other_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("in one word", "in a word"))


def other_limit(folder):
    name = "processor_config.json" if (folder / "processor_config.json").exists() else None
    name = name or "preprocessor_config.json"

    def edit(value):
        value["max_pixels"] = 20 * 28**2
        value["size"] = {"shortest_edge": 4 * 28**2, "longest_edge": 20 * 28**2}

    edited(folder, name, edit)


def other_pooling(folder):
    edited(folder, "1_Pooling/config.json", lambda value: value.update(pooling_mode="mean"))


def no_normalization(folder):
    path = folder / "modules.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))


def other_prompt(folder):
    edited(folder, "config.json", lambda value: value["puma_jax"]["prompt"].update(template="bare"))


def other_golden_vectors(folder):
    path = folder / "golden/vectors.safetensors"
    vectors = load_file(path)["vectors"]
    vectors[3] = vectors[2]
    save_file({"vectors": vectors}, path)


@pytest.mark.parametrize(
    ("kind", "change", "engine", "item"),
    [
        ("sentence-transformers", other_template, "Sentence Transformers", ""),
        ("sentence-transformers", other_limit, "Sentence Transformers", "large image"),
        ("sentence-transformers", other_pooling, "Sentence Transformers", ""),
        ("sentence-transformers", no_normalization, "Sentence Transformers", ""),
        ("huggingface", other_limit, "transformers", "large image"),
        ("huggingface", other_prompt, "puma_jax", ""),
        ("huggingface", other_golden_vectors, "golden vectors of ", "right to left"),
    ],
)
def test_what_is_changed_by_hand_differs(agreement, exports, tmp_path, kind, change, engine, item):
    folder = tmp_path / "copy"
    shutil.copytree(exports[kind], folder)
    change(folder)
    found = next(
        check for check in agreement.checks_of_export(folder) if check.engine.startswith(engine)
    )
    assert found.verdict == "differs"
    assert f"most of all {item}" in found.note


def test_a_stablehlo_folder_that_was_changed_fails_with_its_loader_s_reason(
    agreement, exports, tmp_path
):
    folder = tmp_path / "copy"
    shutil.copytree(exports["stablehlo"], folder)
    edited(folder, "manifest.json", lambda value: value["preprocessing"].update(max_pixels=20_000))
    found = by_engine(agreement.checks_of_export(folder))["StableHLO"]
    assert found.verdict == "failed"
    assert "manifest.json was changed" in found.note


def test_a_difference_is_an_exit_with_1(model, exports, tmp_path, capsys):
    shutil.copytree(exports["sentence-transformers"], tmp_path / "copy")
    other_pooling(tmp_path / "copy")
    with pytest.raises(SystemExit) as stopped:
        entry_point.main(str(model), (tmp_path / "copy",))
    assert stopped.value.code == 1
    assert "differs |" in capsys.readouterr().out


def test_what_is_not_installed_is_not_checked(agreement, exports, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'sentence_transformers'")

    monkeypatch.setattr(engines, "sentence_transformers", missing)
    folder = exports["sentence-transformers"]
    found = by_engine(agreement.checks_of_export(folder))["Sentence Transformers"]
    assert found.verdict == "not checked"
    assert not found.bad
    assert "not installed: No module named 'sentence_transformers'" in table([found])


def test_golden_vectors_are_small_and_say_what_they_are_of(agreement, exports):
    for folder in exports.values():
        files = [*(folder / "golden").iterdir()]
        assert sum(path.stat().st_size for path in files) < 100_000
        vectors, numbers = golden.read(folder, agreement.items)
        np.testing.assert_allclose(vectors, agreement.reference, rtol=0, atol=1e-5)
        assert numbers == list(range(len(agreement.items)))
    listed = json.loads((folder / "golden/items.json").read_text())["items"]
    assert [item["digest"] for item in listed] == [item.digest for item in agreement.items]
    assert len({item["name"] for item in listed}) == len(listed) == 23


def test_damaged_golden_vectors_are_one_line(agreement, exports, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exports["huggingface"], folder)
    path = folder / "golden/vectors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"vectors\.safetensors cannot be read: .*: export the"):
        golden.read(folder, agreement.items)
    edited(folder, "golden/items.json", lambda value: value["items"][0].update(digest="0"))
    save_file({"vectors": agreement.reference}, path)
    (found,) = agreement.check_golden(folder, "float32")
    assert found.verdict == "failed"
    assert "items are other ones than here: English" in found.note


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is no export: it has neither embed\.jax nor"):
        kind_of(tmp_path)


@pytest.mark.filterwarnings("ignore::puma_jax.data.prompts.TextTruncationWarning")
def test_a_running_service_is_asked_for_all_items(agreement, model):
    with serving(Embedder.load(model, dtype="float32"), None, "key") as live:
        found = agreement.check_service(f"{live.url}/", "key")
        refused = agreement.check_service(live.url, None)
    assert (found.verdict, found.compared) == ("equal", len(agreement.items)), found.note
    assert refused.verdict == "failed"
    assert "/v2/embed answers 401: " in refused.note
    gone = agreement.check_service(live.url, "key")
    assert gone.verdict == "failed"
    assert "cannot be reached" in gone.note


@pytest.mark.parametrize("name", ["windowed", "deepstack"])
@pytest.mark.parametrize("prompt", [
    PromptConfig(template="bare", pooling="mean", max_text_tokens=150),
    PromptConfig(template="instruct", pooling="last", max_text_tokens=150),
])  # fmt: skip
def test_transformers_agrees_for_every_family_and_prompt(request, name, prompt):
    pair = request.getfixturevalue(name)
    side = 2 * pair.config.vision.patch_size
    images = ImageConfig(4 * side**2, 30 * side**2)
    embedder = Embedder.load(pair.folder, dtype="float32", images=images, prompt=prompt)
    found = Agreement(embedder, "float32").check_transformers(pair.folder, "float32")
    items = 24 if prompt.template == "instruct" else 23  # one more is empty
    assert (found.verdict, found.compared) == ("equal", items), found.note


def test_a_model_of_texts_has_items_of_texts(tmp_path):
    pair = reference.random_model(reference.text_config("llama", layers=2))
    folder = reference.save_folder(pair, tmp_path / "llama")
    agreement = Agreement(Embedder.load(folder, dtype="float32"), "float32")
    found = agreement.check_transformers(folder, "float32")
    assert (found.verdict, found.compared) == ("equal", 9), found.note
