"""A model with random weights that samples in milliseconds, for the tests of several rooms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.generate.clip_scorer import Clip
from dalle_jax.generate.model import Model
from dalle_jax.models import progressive_prior
from dalle_jax.models.autoregressive_prior import AutoregressivePrior
from dalle_jax.models.clip import CLIP, CLIPConfig
from dalle_jax.models.dvae import DVAE, DVAEConfig
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig
from dalle_jax.models.vqgan import VQGAN, VQGANConfig
from dalle_jax.text.bpe import Tokenizer

PX = 16
DVAE_CONFIG = DVAEConfig(width=8, groups=3, blocks_per_group=1, codes=12, code_width=8)
VQGAN_SIZES = {"width": 4, "multipliers": (1, 1, 2), "blocks_per_group": 1, "attention": ()}
VQGAN_CONFIG = VQGANConfig(**VQGAN_SIZES, z_width=8, codes=12, code_width=8)


@functools.cache
def tokenizer():
    return Tokenizer.train(["red apple", "blue heart", "crying cat"], vocabulary=320)


@functools.cache
def parts():
    config = PriorConfig(
        width=16,
        depth=2,
        heads=2,
        text_vocabulary=tokenizer().vocabulary,
        text_length=64,
        grid=4,
        codes=12,
        kernel=3,
    )
    text, codes = jnp.zeros((1, 63), jnp.int32), jnp.zeros((1, 16), jnp.int32)
    return {
        "px": PX,
        "codec": DVAE_CONFIG,
        "codec_params": dvae_params(0),
        "prior": config,
        "prior_params": _drawn(1, AutoregressivePrior(config), text, codes),
        "tokenizer": tokenizer(),
    }


def dvae_params(seed):
    return _drawn(seed, DVAE(DVAE_CONFIG), jnp.zeros((1, PX, PX, 3)))


def vqgan_params(seed):
    return _drawn(seed, VQGAN(VQGAN_CONFIG), jnp.zeros((1, PX, PX, 3)))


def model(**changes):
    """A fresh tiny model; heads and biases are random too, so that captions matter."""
    return Model(**({"name": "tiny"} | parts() | changes))


@functools.cache
def progressive_parts():
    """A second prior, of the other kind."""
    sizes = {"width": 16, "depth": 2, "query_depth": 1, "heads": 2, "grid": 4, "codes": 12}
    sizes |= {"text_vocabulary": tokenizer().vocabulary, "text_length": 64}
    config = ProgressiveConfig(**sizes)
    draw = functools.partial(progressive_prior.init_params, config)
    return {"progressive": config, "progressive_params": _filled(3, draw, jax.random.key(0))}


@functools.cache
def clip_parts():
    image = {"px": 8, "patch": 4, "image_width": 8, "image_depth": 2, "image_heads": 2}
    text = {"text_width": 8, "text_depth": 2, "text_heads": 2, "text_length": 20}
    config = CLIPConfig(**image, **text, text_vocabulary=tokenizer().vocabulary, features=6)
    return {"config": config, "params": clip_params(config, 2), "tokenizer": tokenizer()}


def clip_params(config, seed):
    images = jnp.zeros((1, config.px, config.px, 3), jnp.uint8)
    return _drawn(seed, CLIP(config), images, jnp.zeros((1, config.slots), jnp.int32))


def clip(**changes):
    """A fresh tiny CLIP."""
    return Clip(**({"name": "tiny"} | clip_parts() | changes))


def _drawn(seed, module, *inputs):
    return _filled(seed, lambda *args: module.init(*args)["params"], jax.random.key(0), *inputs)


def _filled(seed, init, *inputs):
    rng = np.random.default_rng(seed)  # numpy compiles nothing
    shapes = jax.eval_shape(init, *inputs)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)
