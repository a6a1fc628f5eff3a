"""What every tokenizer of imported weights keeps when it is saved."""

import numpy as np

from dalle_jax.text.tokenizer_file import load_tokenizer


def check_saved(found, folder, captions, *, vocabulary):
    """Saves a tokenizer and compares what is opened."""
    found.save(folder / "tokenizer.model")
    opened = load_tokenizer(folder / "tokenizer.model")
    assert opened.fingerprint == found.fingerprint and opened.vocabulary == vocabulary
    np.testing.assert_array_equal(
        opened.encode(captions, length=12), found.encode(captions, length=12)
    )
