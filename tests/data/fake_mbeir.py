"""A small benchmark in M-BEIR layout: all three modalities, several sets, one without a name."""

from __future__ import annotations

from pathlib import Path

from puma_jax.data import mbeir
from puma_jax.data.mbeir import Candidate, Instruction, Query
from tests.reference import random_image

UNION_QUERIES = "query/union_train/mbeir_union_up_train.jsonl"
UNION_POOL = "cand_pool/global/mbeir_union_train_cand_pool.jsonl"

INSTRUCTIONS = [
    Instruction("text", "image", "MSCOCO", "9", ("find a picture", "Which picture is it?")),
    Instruction("image", "text", "MSCOCO", "9", ("find a caption",)),
    Instruction("image,text", "image,text", "OVEN", "5", ("answer",)),
]


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
                f"5:3{n}", "What is it?", image, "image,text", ("5:2", "9:999"), 8, ("5:5", "9:4")
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
