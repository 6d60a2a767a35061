import pytest

from puma_jax.data.mbeir.layout import EvaluationSet, discover
from puma_jax.errors import DataError

# The 16 test sets of M-BEIR, in the order of their tasks.
TEST_SETS = [
    *[("fashion200k", 0), ("mscoco", 0), ("visualnews", 0), ("webqa", 1), ("edis", 2)],
    *[("webqa", 2), ("fashion200k", 3), ("mscoco", 3), ("visualnews", 3), ("nights", 4)],
    *[("infoseek", 6), ("oven", 6), ("cirr", 7), ("fashioniq", 7), ("infoseek", 8), ("oven", 8)],
]


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def mbeir_root(tmp_path):
    """A folder with the names of M-BEIR."""
    for name, task in TEST_SETS:
        touch(
            tmp_path,
            f"query/train/mbeir_{name}_train.jsonl",
            f"query/test/mbeir_{name}_task{task}_test.jsonl",
            f"query/val/mbeir_{name}_task{task}_val.jsonl",
            f"qrels/train/mbeir_{name}_train_qrels.txt",
            f"qrels/test/mbeir_{name}_task{task}_test_qrels.txt",
            f"qrels/val/mbeir_{name}_task{task}_val_qrels.txt",
        )
        for split in ("_val", "_test") if name == "mscoco" else ("",):
            touch(tmp_path, f"cand_pool/local/mbeir_{name}_task{task}{split}_cand_pool.jsonl")
    for split in ("train", "val", "test"):
        touch(tmp_path, f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl")
    touch(
        tmp_path,
        "query/union_train/mbeir_union_up_train.jsonl",
        "instructions/query_instructions.tsv",
    )
    return tmp_path


def test_every_file_of_mbeir_is_found(mbeir_root):
    benchmark = discover(mbeir_root)
    assert [(s.name, s.task) for s in benchmark.sets if s.split == "test"] == TEST_SETS
    assert [(s.name, s.task) for s in benchmark.sets if s.split == "val"] == TEST_SETS
    assert not any(s.missing for s in benchmark.sets)
    assert set(benchmark.train) == {name for name, _ in TEST_SETS}
    assert set(benchmark.global_pools) == {"train", "val", "test"}
    assert len(benchmark.local_pools) == 18
    assert len(benchmark.qrels) == 16 + 16 + 10
    assert benchmark.union_train == mbeir_root / "query/union_train/mbeir_union_up_train.jsonl"
    assert benchmark.instructions == mbeir_root / "instructions/query_instructions.tsv"
    assert benchmark.unknown == ()


def test_mscoco_has_a_pool_for_each_split(mbeir_root):
    for found in discover(mbeir_root).sets:
        of_split = f"{found.split}_" if found.name == "mscoco" else ""
        assert (
            found.pool_path.name == f"mbeir_{found.name}_task{found.task}_{of_split}cand_pool.jsonl"
        )


def test_a_users_own_sets_and_splits_are_found(tmp_path):
    name = "my_task0_test photos"
    touch(
        tmp_path,
        f"query/dev/mbeir_{name}_task4_dev.jsonl",
        f"cand_pool/local/mbeir_{name}_task4_cand_pool.jsonl",
    )
    benchmark = discover(str(tmp_path))
    qrels_path = tmp_path / f"qrels/dev/mbeir_{name}_task4_dev_qrels.txt"
    assert benchmark.sets == (
        EvaluationSet(
            name=name,
            task=4,
            split="dev",
            queries_path=tmp_path / f"query/dev/mbeir_{name}_task4_dev.jsonl",
            pool_path=tmp_path / f"cand_pool/local/mbeir_{name}_task4_cand_pool.jsonl",
            qrels_path=qrels_path,
        ),
    )
    assert benchmark.sets[0].missing == (qrels_path,)
    assert (benchmark.train, benchmark.union_train, benchmark.instructions) == ({}, None, None)


def test_files_of_other_names_are_told_from_those_of_the_layout(mbeir_root):
    touch(mbeir_root, "query/test/nights.jsonl", "query/test/mbeir_nights_test.jsonl")
    touch(mbeir_root, "query/test/.mbeir_nights_task4_test.jsonl", "query/test/README.md")
    benchmark = discover(mbeir_root)
    assert sorted(path.name for path in benchmark.unknown) == [
        "mbeir_nights_test.jsonl",
        "nights.jsonl",
    ]
    assert len(benchmark.sets) == 32


def test_a_folder_without_a_benchmark_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none is not a folder"):
        discover(tmp_path / "none")
    touch(tmp_path, "query/test/queries.jsonl")
    with pytest.raises(DataError, match=f"{tmp_path} holds no benchmark in M-BEIR layout"):
        discover(tmp_path)


def test_a_task_that_does_not_exist_is_named(tmp_path):
    touch(tmp_path, "query/test/mbeir_own_task5_test.jsonl")
    with pytest.raises(
        DataError, match=r"mbeir_own_task5_test.jsonl: task 5 is not one of 0, 1, 2"
    ):
        discover(tmp_path)
