"""Shipped models sample, decode, encode and score as when golden/codes.json was written."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import shipped

import dalle_jax
from dalle_jax.generate import model_folder

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "codes.json").read_text())
PRIORS = [(name, part) for name, model in GOLDEN.items() for part in model["priors"]]
opened = functools.cache(dalle_jax.load)


def test_every_shipped_prior_has_golden_codes():
    assert set(PRIORS) == {
        (name, part) for name in model_folder.shipped_models() for part in opened(name).priors
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), PRIORS)
def test_a_shipped_prior_samples_its_golden_codes(name, part):
    # The captions are such that rounding changes no code (make_codes.py); the share is for more.
    golden = GOLDEN[name]["priors"][part]
    codes = shipped.sampled(opened(name), part, golden["captions"])
    assert (codes == np.array(golden["codes"])).mean() >= 0.95


@pytest.mark.parametrize(("name", "part"), PRIORS)
def test_golden_codes_have_the_colours_and_the_scores_they_had(name, part):
    golden, model = GOLDEN[name]["priors"][part], opened(name)
    tiles = shipped.tiles(model, golden["codes"])
    np.testing.assert_allclose(tiles, golden["tiles"], atol=2)  # of 255
    if "scores" in golden:
        scores = shipped.scores(model, golden["captions"], golden["codes"])
        np.testing.assert_allclose(scores, golden["scores"], atol=0.005)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_shipped_codec_gives_images_their_golden_codes(name):
    assert (shipped.encoded(opened(name)) == np.array(GOLDEN[name]["encoded"])).mean() >= 0.95
