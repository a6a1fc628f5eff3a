"""Merges of the tokenizer are skipped in training batches, anew for each example."""

import numpy as np

from dalle_jax.data.batches import batches
from dalle_jax.text.bpe import Tokenizer

CAPTION = "number picture number picture"
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
