"""What an experiment asks the data and the loop for is what its runs say; it exports averages."""

import dataclasses
import os
from unittest.mock import ANY

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
import stages
import tiny

from dalle_jax.generate import tensor_file
from dalle_jax.train import run_settings
from dalle_jax.train.loop import LoopConfig

ONE_PROCESS = {
    "process_index": 0,
    "process_count": 1,
    "threads": max(4, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ANY,
}


def seeded(name):
    return stages.changed(stages.RUNS[name], "loop", LoopConfig(steps=12, seed=5))


@pytest.mark.parametrize("name", ["dvae", "vqgan"])
def test_codecs_learn_from_crops_of_listing_1(name):
    run = seeded(name)
    expected = {"px": run.px, "batch_size": 4, "seed": 5, "crop": "dvae"} | ONE_PROCESS
    assert stages.experiment_of(run).batches == {"source": "images"} | expected


@pytest.mark.parametrize("encode_once", [True, False])
@pytest.mark.parametrize("name", ["prior", "progressive"])
def test_priors_learn_from_crops_of_listing_2_with_both_dropouts(name, encode_once):
    changes = {"bpe_dropout": 0.3, "caption_dropout": 0.2, "encode_once": encode_once}
    seen = stages.experiment_of(dataclasses.replace(seeded(name), **changes))
    assert seen.batches == ONE_PROCESS | {
        "source": "codes of images" if encode_once else "images",
        "batch_size": 4,
        "seed": 5,
        "px": tiny.PX,
        "crop": "prior",
        "bpe_dropout": 0.3,
        "caption_dropout": 0.2,
        "tokenizer": tiny.tokenizer(),
        "text_length": tiny.parts()["prior"].text_length,
    }
    assert (seen.train["iterator"] == "EncodedBatches") != encode_once


def test_clip_learns_from_crops_of_listing_2_and_from_reconstructed_images():
    run = seeded("clip")
    assert stages.experiment_of(run).batches == ONE_PROCESS | {
        "source": "images, reconstructed images",
        "batch_size": 4,
        "seed": 5,
        "px": run.model.px,
        "crop": "prior",
        "tokenizer": tiny.tokenizer(),
        "text_length": run.model.text_length - 1,
    }


@pytest.mark.parametrize("name", stages.RUNS)
def test_the_loop_gets_the_runs_lengths_and_saves_all_settings(name):
    run = seeded(name)
    seen = stages.experiment_of(run).train
    assert (seen["stage"], seen["config"]) == (name, run.loop)
    fields = {field.name for field in dataclasses.fields(run)}
    assert fields - {"loop"} <= seen["settings"]["run"].keys()
    assert seen["may_change"] == run_settings.MAY_CHANGE


@pytest.mark.parametrize("name", stages.RUNS)
def test_averaged_weights_are_exported_rounded_as_they_are_stored(name):
    model = stages.experiment_of(stages.RUNS[name]).model
    params = model.params if name == "clip" else model.codec_params
    if name in ("prior", "progressive"):
        assert list(model.priors) == [name]
        _, params = model.priors[name]
    rounded = float(np.float32(1.003).astype(ml_dtypes.bfloat16))
    assert rounded != np.float32(1.003)
    found = {float(x) for leaf in jax.tree.leaves(params) for x in np.unique(leaf)}
    assert found == {rounded, float(np.float32(1.003))}
    for path, leaf in tensor_file.flatten_params(params).items():
        exact = not path.endswith("kernel") or path.startswith(tensor_file.EXACT)
        chex.assert_trees_all_equal(np.unique(leaf), np.float32([1.003 if exact else rounded]))
