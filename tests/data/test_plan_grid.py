"""No run ends because a batch does not fit its rows: plans of many steps, of all kinds of data."""

import pytest

from puma_jax.config import PlanConfig
from tests.data.plan_grid import TABLES, plan_all, plan_of, table_of


@pytest.fixture(scope="module", params=TABLES)
def of_seed(request):
    """A plan of one of the tables, by seed and batch."""
    lengths = TABLES[request.param]
    table = table_of(lengths)
    return lambda **settings: plan_of(lengths, table, PlanConfig(**settings))


@pytest.mark.parametrize("data_shards", [1, 8])
@pytest.mark.parametrize(("batch", "steps"), [(256, 25), (16, 100)])
def test_every_item_of_every_step_has_a_place_and_few_steps_need_more_chunks(
    of_seed, batch, steps, data_shards
):
    for seed in range(2):
        found = list(plan_all(of_seed(batch_size=batch, seed=seed), 1, data_shards, steps))
        assert len(found) == steps
        assert sum(chunks > 1 for chunks in found) <= 0.05 * steps
        assert max(found) <= 2


@pytest.mark.parametrize("data_shards", [1, 8])
def test_rows_that_were_chosen_for_smaller_batches_do_for_larger_ones(of_seed, data_shards):
    """However far off the choice of rows is: there are more chunks, and no other difference."""
    shape = of_seed(batch_size=16).fitting_shape(1, data_shards)
    found = list(plan_all(of_seed(batch_size=256), 1, data_shards, 20, shape))
    assert min(found) > 2
