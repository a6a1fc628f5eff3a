import functools

import numpy as np
import pytest
import tiny
from PIL import Image

from dalle_jax.errors import UserError
from dalle_jax.generate.edit import blend, masked_cells, random_cells
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.pixels import encode_png


def test_a_cell_is_sampled_again_if_one_of_its_pixels_is_marked():
    mask = np.zeros((8, 8), bool)
    mask[3, 4] = True
    cells = masked_cells(mask, (8, 8), px=8, grid=4)
    assert np.argwhere(cells).tolist() == [[1, 2]]


def test_a_mask_file_is_cut_as_its_image_is(tmp_path):
    mask = np.zeros((8, 16, 3), np.uint8)  # of which the middle square is kept
    mask[:4, 4:8] = 255
    mask[:, :4] = 255
    (tmp_path / "mask.png").write_bytes(encode_png(mask))
    cells = masked_cells(tmp_path / "mask.png", (8, 16), px=8, grid=4)
    assert np.argwhere(cells).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def strokes(colour, background):
    """One painted pixel of a mask of 8 x 8."""
    image = np.full((8, 8, 4), background, np.uint8)
    image[1, 5] = colour
    return image


WHITE, BLACK, CLEAR = (255, 255, 255, 255), (0, 0, 0, 255), (255, 255, 255, 0)


@pytest.mark.parametrize(
    "mask",
    [
        strokes(WHITE, CLEAR),
        strokes(WHITE, (0, 0, 0, 0)),
        strokes(WHITE, (255, 0, 0, 0)),
        strokes((200, 180, 230, 255), BLACK),  # as JPEG colours it
        strokes(WHITE, BLACK)[..., :3],
        strokes(WHITE, BLACK)[..., 0],
        strokes(WHITE, BLACK)[..., 0] > 0,
    ],
)
def test_white_is_marked_in_masks_of_every_kind(mask, tmp_path):
    wanted = np.zeros((4, 4), bool)
    wanted[0, 2] = True
    file = tmp_path / "mask.png"
    image = Image.fromarray(mask)
    image.save(file)
    for given in (mask, image, file):
        np.testing.assert_array_equal(masked_cells(given, (8, 8), px=8, grid=4), wanted)


@pytest.mark.parametrize(
    "mask", [strokes((255, 0, 0, 255), CLEAR), strokes(BLACK, (0, 0, 255, 255))]
)
def test_colours_of_a_mask_are_refused_with_what_counts_as_marked(mask, tmp_path):
    file = tmp_path / "mask.png"
    Image.fromarray(mask).save(file)
    for given in (mask, file):
        with pytest.raises(UserError, match="at x=.*; paint white what is to be sampled ag"):
            masked_cells(given, (8, 8), px=8, grid=4)


@pytest.mark.parametrize("mask", [np.ones((8, 8)), np.ones((1, 8, 8), bool), np.ones(8, np.uint8)])
def test_arrays_that_are_no_mask_are_refused(mask):
    with pytest.raises(UserError, match=r"the mask is .* \[.*\]; it must be bool \[H, W\], or"):
        masked_cells(mask, (8, 8), px=8, grid=4)


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"the mask has 4 x 8 pixels and its image 8 x 8"):
        masked_cells(np.ones((8, 4), bool), (8, 8), px=8, grid=4)
    with pytest.raises(ValueError, match="the mask marks nothing; paint white what is to be"):
        masked_cells(np.zeros((8, 8), bool), (8, 8), px=8, grid=4)


def test_variations_sample_as_many_cells_again_at_places_of_their_own():
    cells = random_cells(0.25, 4, n=6, seed=3)
    assert (cells.sum((1, 2)) == 4).all()
    assert len({one.tobytes() for one in cells}) > 1
    np.testing.assert_array_equal(cells[:2], random_cells(0.25, 4, n=2, seed=3))
    assert random_cells(0.001, 4, n=1, seed=0).sum() == 1
    with pytest.raises(ValueError, match=r"strength is 1.5, but must be above 0 and at most 1"):
        random_cells(1.5, 4, n=1, seed=0)


def test_blending_keeps_the_old_image_beyond_half_a_cell_and_ramps_between():
    anew = np.zeros((4, 4), bool)
    anew[1, 1] = True
    old, new = np.zeros((16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 240, np.uint8)
    row = blend(old, new, anew)[0, 5, :, 0]
    #  half a cell of 4 pixels is 2: 2/3, 1/3 and 0 outside of columns 4 to 7
    assert row.tolist() == [0, 0, 80, 160, 240, 240, 240, 240, 160, 80, 0, 0, 0, 0, 0, 0]
    assert blend(old, new, anew)[0, 12:].max() == 0


@functools.cache
def model():
    return tiny.model(**tiny.progressive_parts())


@functools.cache
def image():
    return np.random.default_rng(1).integers(0, 256, (tiny.PX, tiny.PX, 3), dtype=np.uint8)


def test_an_edit_keeps_what_is_outside_the_mask_and_samples_inside_of_it():
    mask = np.zeros((tiny.PX, tiny.PX), bool)
    mask[:3, :4] = True  # within the first cell of 4 x 4
    images = model().edit(image(), ["red apple", "crying cat"], mask=mask, n=2, seed=1)
    assert images.shape == (2, 2, tiny.PX, tiny.PX, 3)
    np.testing.assert_array_equal(images[:, :, 6:], np.broadcast_to(image()[6:], (2, 2, 10, 16, 3)))
    np.testing.assert_array_equal(
        images[:, :, :, 6:], np.broadcast_to(image()[:, 6:], (2, 2, 16, 10, 3))
    )
    assert (images[:, :, :4, :4] != image()[:4, :4]).any(axis=(2, 3, 4)).all()
    again = model().edit(image(), "crying cat", mask=mask, n=1, seed=1)
    np.testing.assert_array_equal(again[0, 0], images[1, 0])


def test_variations_keep_the_codes_of_the_other_cells(monkeypatch):
    seen = []
    decode = type(model()).decode
    monkeypatch.setattr(
        type(model()), "decode", lambda self, codes: (seen.append(codes), decode(self, codes))[1]
    )
    model().edit(image(), "red apple", strength=0.25, n=2)
    kept = (seen[0] == model().encode([image()])).reshape(2, -1).sum(axis=1)
    assert (kept >= 12).all()


def test_a_trace_ends_with_the_image_and_begins_grey():
    for decoder, frames in (("progressive", 3), ("autoregressive", 4)):
        stages = 3 if decoder == "progressive" else None
        sampling = SamplingConfig(decoder=decoder, temperature=0.5, stages=stages)
        options = {"seed": 2, "sampling": sampling}
        trace = model().trace("red apple", n=2, **options)
        assert trace.shape == (frames, 1, 2, tiny.PX, tiny.PX, 3)
        np.testing.assert_array_equal(trace[-1], model().generate("red apple", n=2, **options))
        grey = (trace == 240).all(axis=-1).mean(axis=(1, 2, 3, 4))
        assert (np.diff(grey) < 0).all()
        assert grey[0] > 0.5
    rows = (trace[0, 0, 0] == 240).all(axis=(1, 2))
    assert rows[4:].all()  # raster order: after one row of cells the others are grey


STAGES_99 = SamplingConfig(stages=99)
AUTOREGRESSIVE = SamplingConfig(decoder="autoregressive")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the mask is None and strength None; give one of the two"),
        ({"strength": 0.5, "sampling": STAGES_99}, r"stages is 99, but must lie in 1\.\.8"),
        ({"strength": 0.5, "sampling": AUTOREGRESSIVE}, "an edit needs the progressive decoder"),
        ({"strength": 0.5, "n": 0}, "n is 0; at least 1 image"),
    ],
)
def test_bad_edits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model().edit(image(), "red apple", **options)


def test_a_model_without_a_progressive_prior_cannot_edit():
    with pytest.raises(ValueError, match="has no progressive prior; its decoder is autoregressive"):
        tiny.model().edit(image(), "red apple", strength=0.5)
