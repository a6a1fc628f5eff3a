"""Muon as an option of every stage."""

import jax
import optax
import pytest
import tiny

from dalle_jax.train.clip_stage import ClipStage, short_clip_run
from dalle_jax.train.dvae_stage import DVAEStage, short_dvae_run
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorStage, short_prior_run
from dalle_jax.train.progressive_stage import ProgressiveStage, progressive_run
from dalle_jax.train.state import init_state
from dalle_jax.train.vqgan_stage import VQGANRun, VQGANStage

LOOP = LoopConfig(steps=100)
CODEC = {"init_images": lambda: None, "validation": lambda: iter(())}
PRIOR = {"codec_model": None, "tokenizer": None, "validation": lambda: iter(()), "captions": ()}


def dvae(**changes):
    return DVAEStage(
        short_dvae_run(model=tiny.DVAE_CONFIG, px=tiny.PX, loop=LOOP, **changes), **CODEC
    )


def vqgan(**changes):
    judge = {"adversarial_weight": 0.5, "discriminator_width": 4, "discriminator_layers": 1}
    return VQGANStage(
        VQGANRun(model=tiny.VQGAN_CONFIG, px=tiny.PX, loop=LOOP, **judge, **changes), **CODEC
    )


def clip(**changes):
    config = tiny.clip_parts()["config"]
    return ClipStage(short_clip_run(model=config, loop=LOOP, **changes), validation={})


def prior(**changes):
    run = short_prior_run(model=tiny.parts()["prior"], loop=LOOP, **changes)
    return PriorStage(run, **PRIOR)


def progressive(**changes):
    run = short_prior_run(model=tiny.parts()["prior"], loop=LOOP, **changes)
    return ProgressiveStage(progressive_run(run), **PRIOR)


def momentum(stage):
    """Paths of the parameters that have Muon's momentum."""
    state = jax.eval_shape(lambda: init_state(stage, jax.random.key(0)))
    states = jax.tree.leaves(state.opt_state, is_leaf=is_muon)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for found in filter(is_muon, states)
        for path, _ in jax.tree.leaves_with_path(found.mu)
    }


def is_muon(state):
    return isinstance(state, optax.contrib.MuonState)


@pytest.mark.parametrize(
    ("stage", "kernels", "one"),
    [
        (dvae, 29, "decoder/group_1_block_1/conv_2/kernel"),
        (vqgan, 40, "network/encoder/mid/block_1/conv1/kernel"),  # none of the discriminator's
        (clip, 8, "text/layers/qkv/kernel"),
        (prior, 4, "layers/mlp_in/kernel"),
        (progressive, 4, "layers/attention_out/kernel"),
    ],
)
def test_every_stage_has_muon_for_its_matrices_and_only_where_it_is_chosen(stage, kernels, one):
    moved = momentum(stage(optimizer="muon"))
    assert len(moved) == kernels and one in moved
    assert not any(path.startswith("judge") for path in moved)
    assert momentum(stage()) == set()
