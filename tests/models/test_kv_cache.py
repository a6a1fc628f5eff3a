import numpy as np
import pytest

from dalle_jax.models.kv_cache import layout
from dalle_jax.models.masks import attention_mask

KINDS = ["dense", "row", "column", "conv"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "kernel"), [(1, 11), (2, 3), (4, 3), (5, 5), (4, 11), (16, 11)])
def test_every_key_that_a_query_may_see_is_still_in_its_slot(kind, grid, kernel):
    mask = attention_mask(kind, text_length=1, grid=grid, kernel=kernel)[1:, 1:]
    lane, slot, seen = layout(kind, grid=grid, kernel=kernel)
    kept = {}  # written position by position, as drawing does
    for p in range(grid * grid):
        kept[lane[p], slot[p]] = p
        found = [kept.get((lane[p], s)) for s in np.flatnonzero(seen[p])]
        assert sorted(found) == np.flatnonzero(mask[p]).tolist()


def test_a_row_layer_keeps_a_ring_of_one_row_and_itself():
    lane, slot, seen = layout("row", grid=2, kernel=3)
    assert lane.tolist() == [0, 0, 0, 0]
    assert slot.tolist() == [0, 1, 2, 0]
    np.testing.assert_array_equal(seen, [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]])


def test_a_column_layer_keeps_each_column_apart():
    lane, slot, seen = layout("column", grid=2, kernel=3)
    assert lane.tolist() == [0, 1, 0, 1]
    assert slot.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(seen, [[1, 0], [1, 0], [1, 1], [1, 1]])


def test_slots_are_as_few_as_the_reach_of_a_layer():
    slots = {kind: layout(kind, grid=32, kernel=11).seen.shape[1] for kind in KINDS}
    # conv reaches 5 rows and the whole row before, since its left half wraps around
    assert slots == {"dense": 1024, "row": 33, "column": 32, "conv": 192}
