"""The masks against figure 11 of the paper, written out: 6 text and 4 x 4 image positions."""

import numpy as np
import pytest

from dalle_jax.models.masks import attention_mask, layer_kinds, window_mask

# text keys | image keys, one line a query
TEXT_ROWS = """
    100000 0000000000000000
    110000 0000000000000000
    111000 0000000000000000
    111100 0000000000000000
    111110 0000000000000000
    111111 0000000000000000
"""

IMAGE_ROWS = {
    "row": """
    111111 1000000000000000
    111111 1100000000000000
    111111 1110000000000000
    111111 1111000000000000
    111111 1111100000000000
    111111 0111110000000000
    111111 0011111000000000
    111111 0001111100000000
    111111 0000111110000000
    111111 0000011111000000
    111111 0000001111100000
    111111 0000000111110000
    111111 0000000011111000
    111111 0000000001111100
    111111 0000000000111110
    111111 0000000000011111
""",
    "column": """
    111111 1000000000000000
    111111 0100000000000000
    111111 0010000000000000
    111111 0001000000000000
    111111 1000100000000000
    111111 0100010000000000
    111111 0010001000000000
    111111 0001000100000000
    111111 1000100010000000
    111111 0100010001000000
    111111 0010001000100000
    111111 0001000100010000
    111111 1000100010001000
    111111 0100010001000100
    111111 0010001000100010
    111111 0001000100010001
""",
    "conv": """
    111111 1000000000000000
    111111 1100000000000000
    111111 0110000000000000
    111111 1011000000000000
    111111 1101100000000000
    111111 1110110000000000
    111111 0111011000000000
    111111 1011101100000000
    111111 0101110110000000
    111111 0010111011000000
    111111 0001011101100000
    111111 0000101110110000
    111111 0000010111011000
    111111 0000001011101100
    111111 0000000101110110
    111111 0000000010111011
""",
    "dense": """
    111111 1000000000000000
    111111 1100000000000000
    111111 1110000000000000
    111111 1111000000000000
    111111 1111100000000000
    111111 1111110000000000
    111111 1111111000000000
    111111 1111111100000000
    111111 1111111110000000
    111111 1111111111000000
    111111 1111111111100000
    111111 1111111111110000
    111111 1111111111111000
    111111 1111111111111100
    111111 1111111111111110
    111111 1111111111111111
""",
}


@pytest.mark.parametrize("kind", IMAGE_ROWS)
def test_mask_equals_the_written_out_table(kind):
    lines = (TEXT_ROWS + IMAGE_ROWS[kind]).replace(" ", "").split()
    expected = np.array([[cell == "1" for cell in line] for line in lines])
    mask = attention_mask(kind, text_length=6, grid=4, kernel=3)
    assert mask.shape == (22, 22)
    np.testing.assert_array_equal(mask, expected)


def test_conv_11_on_grid_32_sees_66_distances_with_wraparound():
    mask = attention_mask("conv", text_length=1, grid=32, kernel=11)
    seen = 1023 - np.flatnonzero(mask[-1, 1:])
    ranges = [(0, 5), (27, 37), (59, 69), (91, 101), (123, 133), (155, 165), (187, 191)]
    expected = [d for low, high in ranges for d in range(low, high + 1)]
    assert len(expected) == 66
    assert sorted(seen) == expected


def test_row_on_grid_32_sees_33_and_column_one_key_a_row():
    row = attention_mask("row", text_length=2, grid=32)
    column = attention_mask("column", text_length=2, grid=32)
    assert row[-1, 2:].sum() == 33
    assert column[-1, 2:].sum() == 32


@pytest.mark.parametrize("kind", IMAGE_ROWS)
@pytest.mark.parametrize("grid", [1, 2, 3, 5])
def test_every_position_sees_itself_all_text_and_nothing_later(kind, grid):
    mask = attention_mask(kind, text_length=3, grid=grid)  # kernel 11 reaches beyond these grids
    assert mask.diagonal().all()
    assert not np.triu(mask, 1).any()
    assert mask[3:, :3].all()


@pytest.mark.parametrize(
    ("query", "seen", "wrapped"),
    [
        (5, {0, 1, 2, 4, 5}, set()),
        (4, {0, 1, 4}, {3}),
        (7, {2, 3, 6, 7}, {0, 4}),
        (12, {8, 9, 12}, {0, 1, 3, 11}),
    ],
)
def test_a_window_of_3_ends_at_the_edges_or_wraps_around_them(query, seen, wrapped):
    for wraps, wanted in ((False, seen), (True, seen | wrapped)):
        mask = window_mask(grid=4, kernel=3, wraps=wraps)
        assert set(np.flatnonzero(mask[query])) == wanted


def test_windows_of_the_published_size_are_as_dense_as_those_of_the_release():
    for wraps, share in ((True, 0.152), (False, 0.144)):  # of 1152 x 1152, text and image
        mask = attention_mask("dense", text_length=128, grid=32)
        mask[128:, 128:] = window_mask(grid=32, wraps=wraps)
        assert round(mask.mean(), 3) == share


def test_64_layers_are_16_column_47_row_and_1_conv():
    kinds = layer_kinds(64)
    assert [kinds.count(kind) for kind in ("column", "row", "conv")] == [16, 47, 1]
    assert [i for i, kind in enumerate(kinds, 1) if kind == "column"] == list(range(2, 63, 4))
    assert kinds[-1] == "conv"


def test_small_depths_keep_conv_last():
    assert layer_kinds(1) == ("conv",)
    assert layer_kinds(2) == ("row", "conv")
    assert layer_kinds(6) == ("row", "column", "row", "row", "row", "conv")


def test_bad_arguments_say_what_is_allowed():
    with pytest.raises(ValueError, match="grid is 0, but must be at least 1"):
        attention_mask("row", text_length=6, grid=0)
    with pytest.raises(ValueError, match="text_length is -1, but must be at least 1"):
        attention_mask("row", text_length=-1, grid=4)
    with pytest.raises(ValueError, match="kernel is 4, but must be odd"):
        attention_mask("conv", text_length=6, grid=4, kernel=4)
    with pytest.raises(ValueError, match="depth is 0, but must be at least 1 layer"):
        layer_kinds(0)


def test_unknown_kind_lists_the_known_ones():
    # __wrapped__ steps past the shape checker, which would refuse the word before we do
    unchecked = getattr(attention_mask, "__wrapped__", attention_mask)
    with pytest.raises(ValueError, match="'axial', but must be one of"):
        unchecked("axial", text_length=6, grid=4)
