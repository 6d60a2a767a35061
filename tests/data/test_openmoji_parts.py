"""What the demo benchmark is made with: code points taken apart, look-alikes, lots."""

import numpy as np
import pytest

from puma_jax.data.demo import pictures
from puma_jax.data.demo.split import connected, hash_order, hold_out
from puma_jax.data.openmoji import emoji_codes


@pytest.mark.parametrize(
    ("source", "target", "edit"),
    [
        ("1F468-200D-1F373", "1F469-200D-1F373", "woman"),
        ("26F9-1F3FB-200D-2642-FE0F", "26F9-1F3FB", "person"),
        ("1F468-1F3FB-200D-1F9B0", "1F468-1F3FB-200D-1F9B2", "bald"),
        ("1F6B6-200D-2640-FE0F", "1F6B6-200D-2640-FE0F-200D-27A1-FE0F", "facing right"),
        ("1F44B-1F3FD", "1F44B", None),  # nobody asks for no skin tone
        ("1F44B-1F3FD", "1F44A-1F3FC", None),
        ("1F468-1F3FB", "1F469-1F3FC", None),  # two traits at once
        ("1F468-200D-2764-FE0F-200D-1F468", "1F469-200D-2764-FE0F-200D-1F468", None),  # which man?
    ],
)
def test_an_edit_names_the_one_trait_that_differs(source, target, edit):
    assert (
        emoji_codes.edit_between(
            emoji_codes.parse_emoji_code(source), emoji_codes.parse_emoji_code(target)
        )
        == edit
    )


def test_pictures_look_alike_up_to_the_noise_of_rendering():
    drawn = np.random.default_rng(0).integers(9, 240, (5, 56, 56, 3)).astype(np.uint8)
    drawn[2] = drawn[0] + 8
    drawn[3] = drawn[1]
    drawn[3, 55, 55, 2] += 9
    drawn[4] = drawn[2]
    assert pictures.look_alikes(drawn) == [0, 1, 0, 3, 0]


def test_holding_out_leaves_every_part_in_training():
    grid = {(a, b): (f"row {a}", f"column {b}") for a in range(6) for b in range(5)}
    grid["alone"] = ("row 0", "seen once")
    splits = hold_out(grid, 0, "test", test=0.7, val=0.2)
    assert set(splits.values()) == {"train", "val", "test"}
    left = {part for key, split in splits.items() if split == "train" for part in grid[key]}
    assert left == {part for some in grid.values() for part in some}
    assert splits["alone"] == "train"


def test_lots_do_not_depend_on_the_other_items():
    order = hash_order(range(20), 3, "test")
    assert order != sorted(order)
    assert [item for item in order if item < 10] == hash_order(range(10), 3, "test")
    assert order != hash_order(range(20), 4, "test")


def test_connected_nodes_share_the_smallest_one():
    assert connected([(3, 2), (5, 4), (2, 4), (7, 7)]) == {2: 2, 3: 2, 4: 2, 5: 2, 7: 7}
