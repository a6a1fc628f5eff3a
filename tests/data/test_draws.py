"""What is drawn for an example of a training batch is drawn anew for each."""

import numpy as np

from dalle_jax.data.batches import batches
from dalle_jax.image.pixels import encode_png
from dalle_jax.text.bpe import Tokenizer

CAPTION = "number image number image"
TOKENIZER = Tokenizer.train([CAPTION], vocabulary=290)


class Same:
    """Eight records with one caption."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        codes, errors = np.zeros((2, 2), np.uint16), np.zeros((2, 2), np.float16)
        return {"id": str(index), "codes": codes, "errors": errors, "captions": [CAPTION]}


def texts(dropout, seed=0):
    text = {"tokenizer": TOKENIZER, "text_length": 40, "bpe_dropout": dropout}
    made = batches(Same(), batch_size=8, seed=seed, px=8, crop="prior", threads=0, **text)
    return next(made)["text"]


def test_without_dropout_every_example_has_the_merged_tokens():
    expected = TOKENIZER.encode([CAPTION], length=39)
    np.testing.assert_array_equal(texts(0.0), np.repeat(expected, 8, axis=0))


def test_with_dropout_examples_of_one_caption_differ_and_say_the_same():
    found = texts(0.5)
    assert len(np.unique(found, axis=0)) > 4
    assert {TOKENIZER.decode(row) for row in found} == {CAPTION}
    assert (found != texts(0.5, seed=1)).any()
    np.testing.assert_array_equal(found, texts(0.5))


class Noise:
    """One large image of noise."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
        return {"id": "0", "image": encode_png(image), "captions": [CAPTION]}


def test_every_epoch_crops_an_image_anew():
    made = batches(Noise(), batch_size=6, seed=0, px=8, crop="prior", threads=0)
    assert len(np.unique(next(made)["image"], axis=0)) == 6
