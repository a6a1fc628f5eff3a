"""What dVAE and VQ-GAN share."""

import numpy as np
import pytest

from dalle_jax.models.codec import code_use


def test_perplexity_of_a_written_out_use_of_codes():
    used, perplexity = code_use(np.array([2, 0, 2, 4]))
    assert used == 3
    assert perplexity == pytest.approx(2**1.5)  # half of the cells 1 bit each, the others 2
