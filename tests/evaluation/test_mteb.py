"""mteb's own tasks, on data made here: its scores are those of our vectors."""

import sys

import numpy as np
import pytest

from puma_jax import Embedder
from puma_jax.errors import ConfigError, ImageError, ItemError
from puma_jax.evaluation.mteb import MtebModel
from tests.reference import random_image

mteb = pytest.importorskip("mteb", reason="pip install -e '.[mteb]'")
from datasets import Dataset, Features, Image, Value  # noqa: E402
from mteb.models import EncoderProtocol  # noqa: E402

WORDS = ("red", "blue", "small", "large", "bicycle", "harbour", "engine", "protein", "river")


@pytest.fixture(scope="module")
def embedder(tiny):
    return Embedder.load(tiny.folder, dtype="float32")


@pytest.fixture
def model(embedder):
    return MtebModel(embedder, "puma/tiny", revision="step-3")


@pytest.fixture
def asked(embedder, monkeypatch):
    """The items and instructions that the embedder is asked for."""
    calls = []
    encode = embedder.encode

    def record(items, *, instruction, progress):
        calls.append((instruction, list(items)))
        return encode(calls[-1][1], instruction=instruction, progress=progress)

    monkeypatch.setattr(embedder, "encode", record)
    return calls


def phrases(n, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 4)) + f" {i}" for i in range(n)]


def images(n, seed):
    sizes = np.random.default_rng(seed).integers(28, 90, (n, 2)).tolist()
    return [random_image(*size, seed=seed + i) for i, size in enumerate(sizes)]


def filled(name, queries, corpus):
    """A task of mteb with our data in the place of its own, and the qrels."""
    tables = []
    for prefix, columns in (("q", queries), ("d", corpus)):
        ids = [f"{prefix}{i}" for i in range(len(next(iter(columns.values()))))]
        kinds = {column: Image() if column == "image" else Value("string") for column in columns}
        features = Features({"id": Value("string"), **kinds})
        tables.append(Dataset.from_dict({"id": ids, **columns}, features))
    rng = np.random.default_rng(7)
    qrels = {}
    for qid in tables[0]["id"]:
        good, better = rng.choice(len(tables[1]), 2, replace=False)
        qrels[qid] = {f"d{good}": 1, f"d{better}": 2}
    task = mteb.get_task(name)
    parts = {"queries": tables[0], "corpus": tables[1], "relevant_docs": qrels, "top_ranked": None}
    task.dataset = {"default": {"test": parts}}
    task.data_loaded = True  # nothing is downloaded
    return task, qrels


def scores(model, task, cache):
    done = mteb.evaluate(model, task, cache=mteb.ResultCache(cache), show_progress_bar=False)
    return done.task_results[0].scores["test"][0]


def ndcg_and_recall(queries, documents, qrels, k):
    """Their means, from unit vectors."""
    discounts = 1 / np.log2(np.arange(2, k + 2))
    ndcg, recall = [], []
    for vector, grades in zip(queries, qrels.values(), strict=True):
        ranked = np.argsort(-documents @ vector)[:k]
        gains = np.array([grades.get(f"d{i}", 0) for i in ranked])
        best = np.sort([*grades.values()])[::-1][:k]
        ndcg.append((gains * discounts).sum() / (best * discounts[: len(best)]).sum())
        recall.append((gains > 0).sum() / len(grades))
    return np.mean(ndcg), np.mean(recall)


TASKS = {
    "SciFact": (  # texts, with titles
        {"text": phrases(12, 0)},
        {"text": phrases(40, 1), "title": [*phrases(20, 2), *[""] * 20]},
    ),
    "VisualNewsT2IRetrieval": ({"text": phrases(12, 3)}, {"image": images(30, 4)}),
    "OVENIT2ITRetrieval": (
        {"text": phrases(12, 5), "image": images(12, 6)},
        {"text": phrases(30, 7), "image": images(30, 8)},
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_those_of_the_vectors(embedder, model, name, tmp_path):
    queries, corpus = TASKS[name]
    task, qrels = filled(name, queries, corpus)
    found = scores(model, task, tmp_path)
    corpus = dict(corpus)
    titles = corpus.pop("title", None)
    if titles:
        corpus["text"] = [
            f"{title} {text}".strip() for title, text in zip(titles, corpus["text"], strict=True)
        ]
    instruction = task.metadata.prompt["query"]
    vectors = [
        embedder.encode(
            [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
            instruction=how,
        )
        for columns, how in ((queries, instruction), (corpus, None))
    ]
    ndcg, recall = ndcg_and_recall(*vectors, qrels, k=10)
    assert 0 < recall < 1  # random weights: neither of them is a number that a mistake gives, too
    assert found["main_score"] == found["ndcg_at_10"] == pytest.approx(ndcg, abs=1e-5)
    assert found["recall_at_10"] == pytest.approx(recall, abs=1e-5)
    assert (tmp_path / f"results/puma__tiny/step-3/{name}.json").is_file()


def test_queries_are_asked_and_documents_are_not(model, asked, tmp_path):
    queries, corpus = {"text": ["a red bicycle"]}, {"text": ["one", "two"], "title": ["Title", ""]}
    task, _ = filled("SciFact", queries, corpus)
    scores(model, task, tmp_path)
    assert asked == [
        (task.metadata.prompt["query"], [{"text": "a red bicycle"}]),
        (None, [{"text": "Title one"}, {"text": "two"}]),
    ]


def test_an_instruction_of_its_own_follows_the_query(model, asked, tmp_path):
    queries = {"text": ["a red bicycle", "a"], "instruction": ["Only old ones.", "Only new ones."]}
    task, _ = filled("IFIRCds", queries, {"text": phrases(3, 0)})
    scores(model, task, tmp_path)
    texts = [{"text": "a red bicycle Only old ones."}, {"text": "a Only new ones."}]
    assert asked[0] == ("Retrieve text based on user query.", texts)


def test_both_sides_of_a_symmetric_task_are_asked(model, asked, tmp_path):
    task = mteb.get_task("STS12")
    table = {"sentence1": phrases(5, 0), "sentence2": phrases(5, 1), "score": [0, 1, 2, 3, 5]}
    task.dataset = {"test": Dataset.from_dict(table)}
    task.data_loaded = True
    found = scores(model, task, tmp_path)
    assert [instruction for instruction, _ in asked] == ["Retrieve semantically similar text."] * 2
    assert -1 <= found["cosine_spearman"] <= 1


def test_empty_documents_have_a_vector(model, asked, tmp_path):
    picture = images(1, 0)[0]
    corpus = {"text": ["", "  ", "one", "two"], "image": [None, picture, None, picture]}
    task, _ = filled("EDIST2ITRetrieval", {"text": ["a red bicycle"]}, corpus)
    scores(model, task, tmp_path)
    assert [sorted(item) for item in asked[1][1]] == [
        ["text"], ["image"], ["text"], ["image", "text"]
    ]  # fmt: skip
    assert asked[1][1][0] == {"text": "."}


def test_mteb_knows_the_model(model, tiny, embedder):
    assert isinstance(model, EncoderProtocol)
    meta = model.mteb_model_meta
    assert meta.n_parameters == sum(of.numel() for of in tiny.torch.parameters())
    assert meta.n_embedding_parameters == tiny.torch.get_input_embeddings().weight.numel()
    assert meta.memory_usage_mb == pytest.approx(meta.n_parameters * 4 / 2**20)
    assert (meta.embed_dim, meta.max_tokens) == (embedder.embedding_dim, 450)


def test_what_cannot_be_done_is_named(model, embedder, monkeypatch):
    task = mteb.get_task("SciFact").metadata
    where = {"task_metadata": task, "hf_split": "test", "hf_subset": "default"}
    with pytest.raises(ItemError, match=r"SciFact default test: a batch has \['audio'\], expected"):
        model.encode([{"audio": [0]}], **where)
    wrong = [{"image": [random_image(56, 56, 0)]}, {"image": [random_image(4, 2000, 1)]}]
    with pytest.raises(ImageError, match=r"SciFact default test query: item 1: image of 2000 × 4"):
        model.encode(wrong, **where, prompt_type=mteb.types.PromptType.query)
    with pytest.raises(ConfigError, match='precision is "int8", expected "float32"'):
        model.encode([{"text": ["a"]}], **where, precision="int8")
    with pytest.raises(ConfigError, match='name "tiny" has no "/", expected organization/model'):
        MtebModel(embedder, "tiny")
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[mteb\]'"):
        MtebModel(embedder, "puma/tiny")
