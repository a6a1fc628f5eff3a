"""Images of one's own, in whatever form they come, are split and padded as asked."""

import pytest
from PIL import Image

from dalle_jax.data import tfds_source
from dalle_jax.data.batches import one_epoch
from dalle_jax.data.own_images import own_splits
from dalle_jax.data.record import SourceError
from dalle_jax.data.record_filters import Filters

RED = (200, 0)  # and another blue in each, or they would be copies of one file


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        Image.new("RGB", (30, 10), (200, 0, number)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a red bar")
    return tmp_path


def test_a_padded_image_lies_whole_on_white_and_others_lose_their_ends(folder):
    plain, padded = (own_splits(folder, pad=pad)[0] for pad in (False, True))
    (cut,), (whole,) = (next(one_epoch(x, batch_size=1, px=30))["image"] for x in (plain, padded))
    assert (cut[..., :2] == RED).all()
    assert (whole[10:20, :, :2] == RED).all()
    assert (whole[:9] == 255).all() and (whole[21:] == 255).all()
    assert padded[0]["id"] != plain[0]["id"]  # so that codes made without padding are not taken
    assert padded[0]["captions"] == plain[0]["captions"]


@pytest.mark.parametrize(
    ("splits", "held_out"),
    [(("test", "train", "validation"), "validation"), (("test", "train"), "test")],
)
def test_a_prepared_set_is_held_out_as_it_was_split(tmp_path, monkeypatch, splits, held_out):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setattr(tfds_source, "split_names", lambda path: list(splits))
    monkeypatch.setattr(tfds_source, "PreparedSource", lambda path, split: [split])
    assert own_splits(tmp_path) == (["train"], [held_out])
    with pytest.raises(SourceError, match="filters are for folders of images"):
        own_splits(tmp_path, filters=Filters(max_aspect=2.0))
