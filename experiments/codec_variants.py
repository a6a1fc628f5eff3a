"""What tokenizers of the study of codecs consist of: the product's VQ-GAN, changed in one thing.

Letters: B batch, R pixel side, G grid side, I cells, D channels of a code, K codes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dalle_jax.evaluate import efficientnet
from dalle_jax.evaluate.features import efficientnet_network
from dalle_jax.losses import codebook_loss, unused_code_pull
from dalle_jax.models import vqgan
from dalle_jax.models.vqgan import VQGAN, VQGANConfig, nearest, straight_through, unit
from dalle_jax.train import codebook_init
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.vqgan_stage import VQGANRun, VQGANStage

LEVELS = (8, 5, 5, 5)  # of finite scalar quantisation: 1,000 codes
START_IMAGES = 512  # for the k-means start of the codebook


class Codec(VQGANStage):
    """The product's stage, in parts that a variant replaces."""

    decoder_width = 1
    """Width of the decoder in that of the encoder."""

    def __init__(self, run: VQGANRun, images: np.ndarray):
        super().__init__(run, init_images=lambda: images, validation=tuple)
        self.wide = VQGAN(replace(run.model, width=self.decoder_width * run.model.width))

    def init(self, key):
        """Initialises the parameters."""
        params = super().init(key)
        if self.decoder_width == 1:
            return params
        return params | {"decoder": vqgan.init_params(self.wide.config, key)["decoder"]}

    def features(self, z):
        """What snaps to codes, from the encoder's features."""
        return z

    def table(self, params):
        """What stands for each code [K, D]."""
        return params["quantize"]["embedding"]

    def pull(self, z, table, codes):
        """The loss that moves features and codes to each other."""
        run = self.run
        pull = codebook_loss(z, table[codes], commitment=run.commitment)
        return pull + run.unused_code_weight * unused_code_pull(z, table, codes)

    def beside(self, params, x, passed, reconstructed):
        """A further loss, of images, of what went to the decoder, and of what came of it."""
        del passed
        if self.judge is None:
            return 0.0
        return self._adversarial(params["judge"], x, reconstructed)[0]

    def loss(self, params, batch, key, step):
        """That of the VQ-GAN, and what the variant adds."""
        del key
        network, x = self.network(params), vqgan.preprocess(batch["image"])
        z, table = self.features(self._apply(network, x, "encode")), self.table(network)
        codes, _ = nearest(z, table)
        passed = straight_through(z, table[codes])
        reconstructed = self._apply(network, passed, "decode")
        pixels = jnp.abs(reconstructed - x).mean()
        beside = self.beside(params, x, passed, reconstructed)
        beside = jnp.where(step < self.run.adversarial_start, 0.0, beside)
        return pixels + self.pull(z, table, codes) + beside, {"pixels": pixels}

    def encode(self, params, images):
        """Codes [B, G, G] of uint8 images."""
        network = self.network(params)
        z = self._apply(network, vqgan.preprocess(images), "encode")
        return nearest(self.features(z), self.table(network))[0]

    def decode(self, params, codes):
        """Images of codes, uint8."""
        network = self.network(params)
        return vqgan.to_uint8(self._apply(network, self.table(network)[codes], "decode"))

    def _apply(self, params, x, method):
        model = self.wide if method == "decode" else self.model
        return model.apply({"params": params}, x, method=method)


class Wide(Codec):
    """The decoder is twice as wide."""

    decoder_width = 2


class DecoderOnly(Codec):
    """The decoder learns on, for codes that stay as they are."""

    learned = ("post_quant_conv", "decoder")

    def __init__(self, run: VQGANRun, images: np.ndarray, *, params):
        super().__init__(run, images)
        self.frozen = {name: x for name, x in params.items() if name not in self.learned}
        self.start = {name: params[name] for name in self.learned}

    def init(self, key):
        """The decoder as it was."""
        del key
        return jax.tree.map(jnp.copy, self.start)

    def init_from_data(self, params):
        """Leaves the codebook alone."""
        return params

    def network(self, params):
        """The decoder with the other parts."""
        return {**self.frozen, **params}


class Unit(Codec):
    """Features and codes have length 1. Source: Yu et al. 2021 (ViT-VQGAN), section 3.2."""

    def init_from_data(self, params):
        """Starts the codebook from clusters of features of length 1."""

        def features(x):
            return unit(self._apply(params, x, "encode"))

        centres, _ = codebook_init.clusters(
            jax.random.key(self.run.loop.seed),
            lambda images: features(vqgan.preprocess(images)),
            self.run.model.codes,
            self._init_images(),
        )
        return {**params, "quantize": {"embedding": centres}}

    def features(self, z):
        """Features of length 1."""
        return unit(z)

    def table(self, params):
        """Codes of length 1."""
        return unit(super().table(params))


class FSQ(Codec):
    """Each of four channels is rounded to one of its levels; no codebook is learned.

    Source: Mentzer et al. 2023, section 3 and listing 1.
    """

    levels = np.array(LEVELS)

    def init(self, key):
        """Initialises the parameters; there is no codebook among them."""
        return {name: x for name, x in super().init(key).items() if name != "quantize"}

    def init_from_data(self, params):
        """Leaves the parameters as they are."""
        return params

    def features(self, z):
        """Channels between their first and last level, which lie in [-1, 1]."""
        half = (self.levels - 1) * (1 - 1e-3) / 2
        offset = np.where(self.levels % 2, 0.0, 0.5)
        half, offset, shift, unit_ = (
            jnp.asarray(x, jnp.float32)[None, None, None]
            for x in (half, offset, np.tan(offset / half), self.levels // 2)
        )
        return (jnp.tanh(z + shift) * half - offset) / unit_

    def table(self, params):
        """The grid of all levels: the nearest point is what rounding gives."""
        del params
        middle = self.levels // 2
        digits = np.stack(np.unravel_index(np.arange(self.levels.prod()), self.levels), axis=-1)
        return jnp.asarray((digits - middle[None]) / middle[None], jnp.float32)

    def pull(self, z, table, codes):
        """Nothing: the levels stay where they are."""
        return 0.0


class Perceptual(Codec):
    """Reconstructions are also compared by what EfficientNet-Lite0 makes of them, at their size.

    Its weight is such that the gradient at their pixels is as long as that of their error there,
    as for the discriminator.
    """

    @cached_property
    def ruler(self):
        """The network's weights."""
        return efficientnet_network().params

    def seen(self, x) -> list:
        """What is compared, of images in [-1, 1]."""
        raise NotImplementedError

    def beside(self, params, x, passed, reconstructed):
        """A loss with the gradient of the mean squared differences, made as long as wanted."""
        wanted, stopped = self.seen(x), jax.lax.stop_gradient(reconstructed)

        def apart(y):
            return sum(jnp.square(a - b).mean() for a, b in zip(self.seen(y), wanted, strict=True))

        value, gradient = jax.value_and_grad(apart)(stopped)
        pixels = jax.grad(lambda y: jnp.abs(y - x).mean())(stopped)
        weight = jnp.linalg.norm(pixels) / (jnp.linalg.norm(gradient) + 1e-9)
        moved = (jax.lax.stop_gradient(weight * gradient) * (reconstructed - stopped)).sum()
        return moved + jax.lax.stop_gradient(value)


class Logits(Perceptual):
    """The logits of its 1,000 classes are compared. Source: Weber et al. 2024 (MaskBit)."""

    def seen(self, x):
        """Logits."""
        return [efficientnet.apply(self.ruler, (x + 1) * 127.5)[1]]


class Features(Perceptual):
    """Its maps at 1/2 to 1/16 of the side are compared. Source: Zhang et al. 2018 (LPIPS)."""

    def seen(self, x):
        """The last map of each size, each cell of length 1."""
        maps = efficientnet.feature_maps(self.ruler, (x + 1) * 127.5)
        last = [x for x, after in pairwise(maps) if x.shape[1] != after.shape[1]]
        return [_unit_cells(x) * x.shape[-1] ** 0.5 for x in last[:4]]


def _unit_cells(x):
    """Vectors of length 1, with a gradient where they are 0 too."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


class NextCode(nn.Module):
    """Predicts what stands for each code in raster order from the ones before it."""

    width: int = 64
    layers: int = 2

    @nn.compact
    def __call__(self, x):
        """From [B, I, D] to predictions [B, I - 1, D] of all but the first."""
        D, start = x.shape[-1], nn.initializers.normal(0.02)
        position = self.param("position", start, (x.shape[1] - 1, self.width))
        y = nn.Dense(self.width)(x[:, :-1]) + position[None]
        mask = nn.make_causal_mask(y[..., 0])
        for _ in range(self.layers):
            y = y + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(y), mask=mask)
            y = y + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(y))))
        return nn.Dense(D)(nn.LayerNorm()(y))


class Next(Codec):
    """A small causal network predicts codes; its squared error, in their variance, moves both.

    Source: Ramanujan et al. 2024 (CRT, arXiv 2412.16326); the network's size and the weight are
    ours.
    """

    weight = 0.1

    def __init__(self, run: VQGANRun, images: np.ndarray):
        super().__init__(run, images)
        self.next = NextCode()
        other = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
        parts = {"network": self.optimizer, "next": other}
        self.optimizer = optax.multi_transform(parts, {name: name for name in parts})

    def init(self, key):
        """Initialises both networks."""
        model = self.run.model
        codes = jnp.zeros((1, (self.run.px // model.factor) ** 2, model.code_width))
        key_network, key_next = jax.random.split(key)
        following = self.next.init(key_next, codes)["params"]
        return {"network": super().init(key_network), "next": following}

    def init_from_data(self, params):
        """Starts the codebook from clusters of images."""
        return {**params, "network": super().init_from_data(params)}

    def network(self, params):
        """The VQ-GAN's parameters."""
        return params["network"]

    def beside(self, params, x, passed, reconstructed):
        """The weighted error of the predictions."""
        codes = passed.reshape(len(passed), -1, passed.shape[-1])
        error = jnp.square(self.next.apply({"params": params["next"]}, codes) - codes[:, 1:])
        return self.weight * error.mean() / codes.var()


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A tokenizer that differs from the base in one thing."""

    stage: Callable[..., Codec] = Codec
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of the network's config that differ."""
    run: Callable[[int], dict[str, Any]] = lambda steps: {}
    """Fields of the run's settings that differ, for a number of updates."""
    decoder_alone: float = 0.0
    """Share of the updates in which the decoder alone learns, at the end."""

    def settings(self, width: int, steps: int, batch: int, seed: int) -> VQGANRun:
        """The run."""
        sizes = {"patch": 4, "width": width, "multipliers": (1, 2), "blocks_per_group": 1}
        sizes |= {"attention": (), "z_width": 64, "codes": 1024, "code_width": 32}
        return VQGANRun(
            model=VQGANConfig(**sizes | self.model),
            loop=LoopConfig(steps=steps, seed=seed),
            px=64,
            batch_size=batch,
            optimizer="muon",
            warmup_steps=min(100, steps // 10),
            **self.run(steps),
        )


def _adversary(steps):
    judge = {"discriminator_width": 32, "discriminator_layers": 3}
    return judge | {"adversarial_weight": 0.3, "adversarial_start": steps // 2}


VARIANTS = {
    "base": Variant(),
    "wide": Variant(stage=Wide),
    "finetuned": Variant(decoder_alone=1 / 3),
    "features": Variant(stage=Features),
    "logits": Variant(stage=Logits),
    "adversarial": Variant(run=_adversary),
    "fsq": Variant(stage=FSQ, model={"codes": int(np.prod(LEVELS)), "code_width": len(LEVELS)}),
    "unit": Variant(stage=Unit, model={"code_width": 8}),
    "book256": Variant(model={"codes": 256}),
    "codes16": Variant(model={"multipliers": (1, 2, 2)}),
    "codes256": Variant(model={"patch": 2}),
    "next": Variant(stage=Next),
}
