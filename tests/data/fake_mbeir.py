"""A small benchmark in M-BEIR layout: all three modalities, several sets, one without a name."""

from __future__ import annotations

import random
from pathlib import Path

from puma_jax.data import mbeir
from puma_jax.data.mbeir import TASKS, Candidate, Instruction, Modality, Qrel, Query
from tests.reference import random_image

UNION_QUERIES = "query/union_train/mbeir_union_up_train.jsonl"
UNION_POOL = "cand_pool/global/mbeir_union_train_cand_pool.jsonl"

INSTRUCTIONS = [
    Instruction("text", "image", "MSCOCO", "9", ("find a picture", "Which picture is it?")),
    Instruction("image", "text", "MSCOCO", "9", ("find a caption",)),
    Instruction("image,text", "image,text", "OVEN", "5", ("answer",)),
]

# The 16 test sets of M-BEIR: the number of each dataset in ids, and its tasks.
TEST_SETS = {
    "visualnews": (0, (0, 3)),
    "fashion200k": (1, (0, 3)),
    "webqa": (2, (1, 2)),
    "edis": (3, (2,)),
    "nights": (4, (4,)),
    "oven": (5, (6, 8)),
    "infoseek": (6, (6, 8)),
    "fashioniq": (7, (7,)),
    "cirr": (8, (7,)),
    "mscoco": (9, (0, 3)),
}
WORDS = ["red", "old", "big", "cat", "dog", "car", "boat", "tree", "sun", "moon", "river"]


def image_path(number: int) -> str:
    return f"mbeir_images/{number % 4}.png"


def candidates() -> list[Candidate]:
    """12 documents: images, texts, images with texts, in turn."""
    return [
        [
            Candidate(f"9:{number}", None, image_path(number), "image"),
            Candidate(f"9:{number}", f"a caption no. {number}", None, "text"),
            Candidate(f"5:{number}", f'"entity {number}"', image_path(number), "image,text"),
        ][number % 3]
        for number in range(12)
    ]


def queries() -> list[Query]:
    """13 queries of four sets; "mine" has no instruction."""
    image = image_path(1)
    return [
        *[
            Query(f"9:1{n}", f"a thing no. {n}", None, "text", (f"9:{3 * n}", "9:0"), 0)
            for n in range(4)
        ],
        *[Query(f"9:2{n}", None, image_path(n), "image", (f"9:{3 * n + 1}",), 3) for n in range(4)],
        *[
            Query(
                f"5:3{n}",
                "What is it?",
                image,
                "image,text",
                ("5:2", "9:999"),
                8,
                ("5:5", "9:4"),
                scores=(("5:2", 0.9), ("5:5", n / 5)),
            )
            for n in range(4)
        ],
        Query("mine:1", None, image, "image", ("9:3",), 4),
    ]


def write_images(root: Path) -> None:
    (root / "mbeir_images").mkdir(parents=True, exist_ok=True)
    for number in range(4):
        random_image(28 + 7 * number, 60, number).save(root / image_path(number))


def write_union(root: Path) -> Path:
    """Write a benchmark whose training sets and pools are united."""
    write_images(root)
    mbeir.write_queries(root / UNION_QUERIES, queries())
    mbeir.write_candidates(root / UNION_POOL, candidates())
    mbeir.write_instructions(root / "instructions/query_instructions.tsv", INSTRUCTIONS)
    return root


def write_sets(root: Path) -> Path:
    """Write a benchmark of one file for each training set and each pool."""
    write_images(root)
    for name, dataset in (("coco", "9:"), ("oven", "5:"), ("mine", "mine:")):
        rows = [query for query in queries() if query.qid.startswith(dataset)]
        mbeir.write_queries(root / f"query/train/mbeir_{name}_train.jsonl", rows)
    for name, kind in (("coco_task0", "image"), ("coco_task3", "text"), ("oven_task8", None)):
        rows = [row for row in candidates() if kind in (row.modality, None)]
        mbeir.write_candidates(root / f"cand_pool/local/mbeir_{name}_cand_pool.jsonl", rows)
    other = [Candidate("8:1", "never asked for", None, "text")]
    mbeir.write_candidates(root / "cand_pool/local/mbeir_other_task1_cand_pool.jsonl", other)
    mbeir.write_instructions(root / "instructions/query_instructions.tsv", INSTRUCTIONS)
    return root


def write_test_sets(root: Path, *, seed: int = 0, global_pool: bool = True) -> Path:
    """Write all 16 test sets, small; their contents are always the same, `seed` orders lines.

    As in the real ones, MSCOCO's pools are named after their split; OVEN and InfoSeek share
    documents, some of which are not in the pool of the set that is asked; one pool holds two
    modalities; one dataset, NIGHTS, has no instructions. One query of each set has no answer.
    """
    write_images(root)
    chance = random.Random(0)
    order = random.Random(seed)
    pools: dict[str, list[Candidate]] = {}
    for name, (dataset, tasks) in TEST_SETS.items():
        for task in tasks:
            pools[f"{name}_task{task}"] = [
                _document(f"{dataset}:{100 * task + n}", modality, chance)
                for n in range(14)
                for modality in [TASKS[task][1] if name != "edis" or n % 3 else "text"]
            ]
    for task in (6, 8):
        shared = pools[f"infoseek_task{task}"][:6]
        pools[f"oven_task{task}"] += shared[:4]
        for name in ("oven", "infoseek"):
            dataset = TEST_SETS[name][0]
            _write_test_set(root, name, dataset, task, pools, shared[3:], chance, order)
    for name, (dataset, tasks) in TEST_SETS.items():
        for task in tasks:
            if name not in ("oven", "infoseek"):
                _write_test_set(root, name, dataset, task, pools, [], chance, order)
    if global_pool:
        every = {document.did: document for pool in pools.values() for document in pool}
        every["9:99999"] = Candidate("9:99999", "red cat", None, "text")
        mbeir.write_candidates(
            root / "cand_pool/global/mbeir_union_test_cand_pool.jsonl",
            _shuffled(every.values(), order),
        )
    instructions = [
        Instruction(*TASKS[task], name, str(dataset), (f"Find {name} {task}.", "Look.", "Which?"))
        for name, (dataset, tasks) in TEST_SETS.items()
        for task in tasks
        if name != "nights"
    ]
    mbeir.write_instructions(root / "instructions/query_instructions.tsv", instructions)
    return root


def _write_test_set(root, name, dataset, task, pools, more, chance, order) -> None:
    """Write queries, local pool and qrels of one set; any document of `more` may answer, too."""
    stem = f"{name}_task{task}"
    pool = pools[stem]
    queries, qrels = [], []
    for number in range(8):
        answers = chance.sample(pool + more, number % 4)
        if number == 1 and more:
            answers = more[-1:]
        content = _document("-", TASKS[task][0], chance)
        words = [document.text for document in answers if document.text]
        text = content.text and " ".join([content.text, *words[:1]])
        image = (content.image and (answers[0].image if answers else None)) or content.image
        query = Query(
            f"{dataset}:{1000 * task + number}", text, image, TASKS[task][0],
            tuple(document.did for document in answers), task,
        )  # fmt: skip
        queries.append(query)
        qrels += [Qrel(query.qid, document.did, 1, task) for document in answers]
        qrels.append(Qrel(query.qid, chance.choice(pool).did, 0, task))
        qrels.append(Qrel("not:asked", chance.choice(pool).did, 1, task))
    pool_name = f"{stem}_test" if name == "mscoco" else stem
    mbeir.write_queries(root / f"query/test/mbeir_{stem}_test.jsonl", _shuffled(queries, order))
    mbeir.write_candidates(
        root / f"cand_pool/local/mbeir_{pool_name}_cand_pool.jsonl", _shuffled(pool, order)
    )
    mbeir.write_qrels(root / f"qrels/test/mbeir_{stem}_test_qrels.txt", _shuffled(qrels, order))


def _document(did: str, modality: Modality, chance: random.Random) -> Candidate:
    text = " ".join(chance.choices(WORDS, k=3)) if "text" in modality else None
    image = image_path(chance.randrange(4)) if "image" in modality else None
    return Candidate(did, text, image, modality)


def _shuffled(items, order: random.Random) -> list:
    return order.sample(list(items), len(items))
