"""The plan: pure in (seed, step), each query once an epoch, rows that hold every step."""

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puma_jax.config import PlanConfig
from puma_jax.data.draws import shuffle
from puma_jax.data.items import TokenizedTemplate
from puma_jax.data.packing import place_in
from puma_jax.data.plan import Plan
from puma_jax.data.shapes import batch_shape
from puma_jax.data.store import Instructions, Prompt
from puma_jax.data.table import LengthTable
from puma_jax.errors import ConfigError, PackingError
from puma_jax.rows import PackedShape
from tests.data.plan_grid import check_packing

QUERIES, CANDIDATES = 1003, 300
SETS = ("large", "small", "tiny")


@pytest.fixture(scope="module")
def table():
    """Three sets of 800, 180 and 23 queries; one to four positives each, up to six negatives."""
    rng = np.random.default_rng(0)
    sides = {}
    for side, n in (("query", QUERIES), ("candidate", CANDIDATES)):
        kind = rng.integers(0, 3, n)
        text = rng.integers(1, 100, n) * (kind != 0)
        sides |= {
            f"{side}_tokens": text + 8,
            f"{side}_height": np.where(kind != 1, 56, 0),
            f"{side}_width": np.where(kind != 1, 28 * rng.integers(2, 20, n), 0),
        }
        sides |= {"query_text_length": text} if side == "query" else {"candidate_modality": kind}
    positives = rng.integers(1, 5, QUERIES)
    start = np.append(0, np.cumsum(positives))
    positive_row = rng.integers(0, CANDIDATES, start[-1])
    negatives = np.arange(QUERIES) % 7
    return LengthTable(
        **sides,
        query_plain_tokens=sides["query_tokens"] + 1,
        query_key=np.where(np.arange(QUERIES) % 5 == 0, -1, np.arange(QUERIES) % 2),
        query_set=np.repeat([0, 1, 2], [800, 180, 23]),
        query_task=np.zeros(QUERIES, int),
        candidate_content=np.arange(CANDIDATES) // 2,
        positive_start=start,
        positive_row=positive_row,
        negative_start=np.append(0, np.cumsum(negatives)),
        negative_row=rng.integers(0, CANDIDATES, negatives.sum()),
    )


@pytest.fixture(scope="module")
def plan_of(table, tiny):
    """Make a plan with some settings."""
    prompts = tuple(tuple(Prompt("", (7,) * n) for n in lengths) for lengths in ((3, 5, 9), (4,)))
    keys = (("0", "text", "image"), ("1", "text", "image"))
    instructions = Instructions(keys, prompts, SETS)
    template = TokenizedTemplate(tiny.config, (1,) * 14, (2,) * 6, (3,) * 8, (4,) * 10)
    return lambda **settings: Plan(table, instructions, template, PlanConfig(**settings))


def drawn_in(pairs):
    """Queries, candidates and prompts, pair by pair."""
    columns = pairs.query, pairs.candidate, pairs.prompt
    return zip(*(column.tolist() for column in columns), strict=True)


def same(first, second):
    return all(np.array_equal(value, getattr(second, name)) for name, value in vars(first).items())


@given(st.integers(1, 3000), st.integers(0, 5))
def test_a_shuffle_is_a_permutation(size, seed):
    shuffled = shuffle(np.arange(size), size, seed)
    assert sorted(shuffled.tolist()) == list(range(size))


def test_shuffles_of_two_seeds_have_nothing_in_common():
    one, other = (shuffle(np.arange(10_000), 10_000, seed) for seed in (0, 1))
    for shuffled in (one, other):
        # As many fixed points and descents as chance would have.
        assert (shuffled == np.arange(10_000)).sum() < 10
        assert abs((np.diff(shuffled) < 0).mean() - 0.5) < 0.03
        assert abs(np.corrcoef(shuffled, np.arange(10_000))[0, 1]) < 0.05
    assert (one == other).sum() < 10


@pytest.mark.parametrize(
    "settings",
    [{}, {"homogeneous_batches": True}, {"balance_window": 5}, {"hard_negatives": 3}],
)
def test_no_query_comes_twice_in_an_epoch_and_all_but_the_rest_come(plan_of, settings):
    plan = plan_of(batch_size=20, **settings)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = np.concatenate([plan.pairs(step).query for step in steps])
        assert len(seen) == len(set(seen.tolist())) == 20 * plan.steps_per_epoch
        assert len(seen) > QUERIES - 3 * 20


@pytest.mark.parametrize("negatives", [0, 2])
def test_any_step_is_planned_the_same_without_those_before(plan_of, negatives):
    def new():
        return plan_of(batch_size=16, hard_negatives=negatives)

    plan = new()
    in_order = [plan.pairs(step) for step in range(130)]
    for step in (129, 0, 64, 31, 32, 99):
        assert same(new().pairs(step), in_order[step])


def test_without_hard_negatives_a_plan_is_what_it_was_before_there_were_any(plan_of):
    """The digest is that of version 0.1, which drew none."""
    plan, digest = plan_of(batch_size=40), hashlib.sha256()
    shape = plan.fitting_shape(2, 8)
    digest.update(repr(shape).encode())
    for number in range(60):
        step = plan.step(number, shape, 2)
        packing = [of_items for name, of_items in vars(step.packing).items() if name != "chunks"]
        pairs = step.pairs
        columns = pairs.query, pairs.candidate, pairs.prompt, step.lengths, step.patches, *packing
        for column in columns:
            digest.update(np.asarray(column, np.int64).tobytes())
    assert digest.hexdigest() == "07efc63ec08aa86023d0b8b922af2b3737614d08b68a93e0055c3c1a09bcb662"


def test_hard_negatives_are_those_of_the_query_each_document_once_and_no_answer(plan_of, table):
    plan = plan_of(batch_size=500, hard_negatives=3)
    content, drawn = table.candidate_content, {}
    for step in range(60):
        pairs = plan.pairs(step)
        assert pairs.negative.shape == (500, 3)
        for query, rows in zip(pairs.query.tolist(), pairs.negative, strict=True):
            answers, listed = (
                set(content[row[start[query] : start[query + 1]]].tolist())
                for start, row in (
                    (table.positive_start, table.positive_row),
                    (table.negative_start, table.negative_row),
                )
            )
            documents = content[rows[rows >= 0]].tolist()
            assert set(documents) <= listed - answers
            # As many as there are, up to three, and none twice.
            assert len(set(documents)) == len(documents) == min(3, len(listed - answers))
            drawn.setdefault(query, (listed - answers, set()))[1].update(documents)
    assert all(listed == seen for listed, seen in drawn.values())


def test_other_settings_draw_the_same_pairs_with_hard_negatives_and_without(plan_of):
    """Whichever pairs make up a batch, a query keeps its positive and its prompt."""
    with_some, without = (plan_of(batch_size=1000, hard_negatives=count) for count in (3, 0))
    some, none = (
        sorted(drawn_in(plan.pairs(step))) for step, plan in ((1, with_some), (1, without))
    )
    assert some == none


def test_rows_hold_the_largest_hard_negative_and_every_step(plan_of, table):
    plan = plan_of(batch_size=100, hard_negatives=4)
    shape = plan.fitting_shape(chunks=2, data_shards=1)
    for number in range(plan.steps_per_epoch):
        step = plan.step(number, shape, 2)
        assert len(step.lengths) == 200 + (step.pairs.negative >= 0).sum()
        check_packing(step.lengths, step.patches, step.packing, shape)
        assert step.packing.chunk.max() < 2
    longer = np.where(np.arange(CANDIDATES) == table.negative_row[0], 999, table.candidate_tokens)
    plan.table = dataclasses.replace(table, candidate_tokens=longer)
    assert plan.largest_item()[0] > 999


def test_dealing_counts_the_sizes_of_hard_negatives(plan_of):
    def spread(window):
        plan = plan_of(batch_size=30, balance_window=window, hard_negatives=5)
        return np.std([plan.item_sizes(plan.pairs(step))[0].sum() for step in range(32)])

    assert spread(32) < spread(1) / 5


def test_hard_negatives_of_queries_without_any_are_refused(plan_of, table):
    bare = dataclasses.replace(
        table, negative_start=np.zeros(QUERIES + 1, int), negative_row=np.zeros(0, int)
    )
    plan = plan_of(batch_size=4)
    with pytest.raises(ConfigError, match=r"plan\.hard_negatives is 2, but neg_cand_list is empty"):
        Plan(
            bare,
            Instructions((), (), SETS),
            plan.template,
            PlanConfig(batch_size=4, hard_negatives=2),
        )


def test_another_seed_or_epoch_is_another_order_and_other_choices(plan_of):
    plan = plan_of(batch_size=500)
    first = np.sort(plan.pairs(0).query)
    assert not np.array_equal(first, np.sort(plan_of(batch_size=500, seed=1).pairs(0).query))
    again, later = ({q: (c, p) for q, c, p in drawn_in(plan.pairs(step))} for step in (0, 2))
    both = set(again) & set(later)
    assert len(both) > 100
    assert sum(again[q] != later[q] for q in both) > len(both) / 2


def test_positives_and_prompts_are_those_of_the_query_all_of_them_sometimes(plan_of, table):
    plan = plan_of(batch_size=500)
    drawn = {}
    for step in range(60):
        for query, candidate, prompt in drawn_in(plan.pairs(step)):
            drawn.setdefault(query, set()).add((candidate, prompt))
    for query, choices in drawn.items():
        here = slice(table.positive_start[query], table.positive_start[query + 1])
        assert {candidate for candidate, _ in choices} <= set(table.positive_row[here].tolist())
        prompts = {-1: {-1}, 0: {0, 1, 2}, 1: {0}}[int(table.query_key[query])]
        assert {prompt for _, prompt in choices} <= prompts
    drawn_all = [
        len(choices) == len({(c, p) for c, _ in choices for _, p in choices})
        for choices in drawn.values()
    ]
    assert np.mean(drawn_all) > 0.7


def test_without_instructions_no_prompt_is_drawn(plan_of):
    plan = plan_of(batch_size=100, instructions=False)
    pairs = plan.pairs(0)
    assert (pairs.prompt == -1).all()
    lengths, patches = plan.item_sizes(pairs)
    plain = plan.table.query_plain_tokens[pairs.query]
    np.testing.assert_array_equal(
        lengths[:100], 20 + plain + np.where(patches[:100] > 0, 2 + patches[:100] // 4, 0)
    )


def test_weights_are_kept_in_every_window(plan_of):
    weights = (("large", 1.0), ("tiny", 0.5), ("small", 2.5))
    plan = plan_of(batch_size=40, mixture_weights=weights)
    counts = np.array(
        [
            np.bincount(plan.table.query_set[plan.pairs(step).query], minlength=3)
            for step in range(64)
        ]
    )
    np.testing.assert_allclose(counts[:25].sum(0) / 1000, [0.25, 0.625, 0.125], atol=0.01)
    # A small set comes round often, but never anew before all of it has come.
    tiny = np.concatenate(
        [plan.pairs(s).query[plan.table.query_set[plan.pairs(s).query] == 2] for s in range(25)]
    )
    visits = np.bincount(tiny - 980, minlength=23)
    assert visits.max() - visits.min() <= 1


def test_a_batch_of_one_set_is_of_one_set_in_proportion(plan_of):
    plan = plan_of(batch_size=20, homogeneous_batches=True)
    sets = [
        set(plan.table.query_set[plan.pairs(s).query].tolist()) for s in range(plan.steps_per_epoch)
    ]
    assert all(len(of_step) == 1 for of_step in sets)
    counts = np.bincount([min(of_step) for of_step in sets], minlength=3)
    assert counts.tolist() == [40, 9, 1]


def test_dealing_makes_all_steps_alike(plan_of):
    def spread(window):
        plan = plan_of(batch_size=30, balance_window=window)
        sizes = [plan.item_sizes(plan.pairs(step)) for step in range(32)]
        return [np.std([size[i].sum() for size in sizes]) for i in (0, 1)]

    dealt, drawn = spread(32), spread(1)
    assert dealt[0] < drawn[0] / 5
    assert dealt[1] < drawn[1] / 2


def test_batches_of_one_set_fit_too_however_rare_the_set(plan_of):
    plan = plan_of(batch_size=20, homogeneous_batches=True)
    shape = plan.fitting_shape(chunks=1, data_shards=1)
    for step in range(plan.steps_per_epoch):
        plan.step(step, shape, 1)


@pytest.mark.parametrize("data_shards", [1, 8])
def test_the_fitting_shape_fits_every_step_of_an_epoch_and_wastes_little(plan_of, data_shards):
    plan = plan_of(batch_size=100)
    shape = plan.fitting_shape(chunks=2, data_shards=data_shards)
    for step in range(plan.steps_per_epoch):
        made = plan.step(step, shape, 2)
        assert made.packing.chunk.max() < 2
        if data_shards == 1:
            assert made.lengths.sum() > 0.85 * 2 * shape.rows * shape.length


def test_rows_hold_the_largest_item_of_all_not_only_of_the_steps_looked_at(plan_of):
    plan = plan_of(batch_size=4)
    shape = plan.fitting_shape(chunks=1, data_shards=1, looked_at=1)
    sizes = [plan.item_sizes(plan.pairs(step)) for step in range(2 * plan.steps_per_epoch)]
    most = tuple(max(int(size[i].max()) for size in sizes) for i in (0, 1))
    assert plan.largest_item()[0] >= most[0]
    assert plan.largest_item()[1] >= most[1]
    assert shape.length >= plan.largest_item()[0]
    assert shape.patch_length >= plan.largest_item()[1]


def test_a_batch_that_does_not_fit_takes_the_fewest_chunks_that_hold_it(plan_of):
    plan, shape = plan_of(batch_size=100), PackedShape(8, 512, 8, 512, 80, data_shards=2)
    for number in range(plan.steps_per_epoch):
        step = plan.step(number, shape, 1)
        assert step.packing.chunks > 1
        assert place_in(step.lengths, step.patches, shape, step.packing.chunks - 1) is None
        check_packing(step.lengths, step.patches, step.packing, shape)
        assert same(plan_of(batch_size=100).step(number, shape, 1).packing, step.packing)


def test_an_item_larger_than_a_row_is_an_error_that_names_settings(plan_of):
    with pytest.raises(PackingError, match=r"a row holds 32: .* lower prompt.max_text_tokens"):
        plan_of(batch_size=100).step(0, PackedShape(2, 32, 2, 512, 300), 1)


def test_rows_hold_images_also_if_no_step_that_was_looked_at_has_one(plan_of):
    plan = plan_of(batch_size=100)
    lengths, patches = plan.item_sizes(plan.pairs(0))
    shape = batch_shape([(lengths, 0 * patches)], 1, 8, plan.largest_item())
    step = plan.step(0, shape, 1)
    assert step.patches.any()
    check_packing(step.lengths, step.patches, step.packing, shape)


def test_sets_that_are_never_drawn_make_no_rows_longer(table, plan_of):
    """Neither their queries nor the candidates that answer no other."""
    longest = np.where(np.arange(QUERIES) == QUERIES - 1, 999, table.query_text_length)
    plan = plan_of(batch_size=4, mixture_weights=(("large", 1.0),), instructions=False)
    plan.table = dataclasses.replace(table, query_plain_tokens=longest + 9)
    drawn = plan.query_sizes(plan.queries(), np.full(800, -1))[0].max()
    answers = np.unique(table.positive_row[: table.positive_start[800]])
    assert np.array_equal(np.flatnonzero(plan.candidates()), answers)
    assert plan.largest_item()[0] == max(drawn, plan.candidate_sizes(answers)[0].max())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 2000}, "batch_size 2000 is larger than the data: 1003 pairs"),
        ({"batch_size": 900, "homogeneous_batches": True}, "larger than the data"),
        ({"mixture_weights": (("none", 1.0),)}, "names none; the sets are large, small, tiny"),
        (
            {
                "batch_size": 1,
                "balance_window": 2,
                "mixture_weights": (("tiny", 1.0), ("large", 9.0)),
            },
            "less than two",
        ),
        ({"mixture_weights": (("tiny", 1.0),), "homogeneous_batches": True}, "exclude each other"),
        ({"batch_size": 0}, "must be in \\[1, "),
    ],
)
def test_settings_that_cannot_be_are_named(plan_of, settings, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(**settings)


def test_a_plan_can_be_sent_to_a_worker(plan_of):
    import pickle

    plan = plan_of(batch_size=16)
    assert same(pickle.loads(pickle.dumps(plan)).pairs(40), plan.pairs(40))
