"""The prior of minDALL-E: a GPT over caption tokens and image codes, dense and causal.

Positions are learned, norms come first in each branch, GELU is exact, and text and codes have
tables and heads of their own. There is no start token: the last caption slot predicts code 0, and
slots without a token hold a pad, which is looked at like any other.

    position   0 .. P-2        P-1            P .. P+I-2
    input      slot 0 .. P-2   slot P-1       code 0 .. I-2
    predicts   slot 1 .. P-1   code 0         code 1 .. I-1

Letters: U prompts, W images of each, B images, P caption slots, I = G * G codes, T positions,
D width, N heads, H head size, V text vocabulary, K codebook, L layers.
Source: Kim et al. 2021, "minDALL-E on Conceptual Captions", and the authors' release; Radford et
al. 2019 (GPT-2).
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from dalle_jax.errors import UserError
from dalle_jax.models.attention import dense
from dalle_jax.models.layers import (
    init_layers,
    init_norm,
    layer,
    layer_norm,
    normal,
    split_qkv,
)

EPSILON = 1e-5
"""Added to the variance in the norms."""


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of the prior; the defaults are those of minDALL-E."""

    width: int = 1536
    """Width D; the MLP is four times as wide."""
    depth: int = 42
    """Layers L."""
    heads: int = 24
    """Attention heads N."""
    text_vocabulary: int = 16384
    """Text tokens V, the pad included."""
    text_slots: int = 64
    """Slots P of a caption."""
    grid: int = 16
    """Side G of the grid of codes."""
    codes: int = 16384
    """Codes K of the codec."""
    pad: int
    """Token of slots that a caption leaves empty."""

    def __post_init__(self):
        for name, size in vars(self).items():
            if size < (name != "pad"):
                raise UserError(f"prior {name} is {size}; it must be at least 1")
        if self.width % self.heads:
            raise UserError(
                f"prior width is {self.width}, but must be a multiple of its {self.heads} heads"
            )
        if self.pad >= self.text_vocabulary:
            raise UserError(
                f"prior pad is {self.pad}, but must be a token below {self.text_vocabulary}"
            )

    @property
    def text_length(self) -> int:
        """One more than the slots, as of our priors, whose text begins outside of them."""
        return self.text_slots + 1

    @property
    def image_length(self) -> int:
        """Codes of an image, I."""
        return self.grid**2


class Captions(NamedTuple):
    """What codes look at of the slots before the last one, and that one, not yet looked at."""

    keys: Float[Array, "L U slots N H"]
    values: Float[Array, "L U slots N H"]
    last: Float[Array, "U D"]
    """Embedding of the last slot, the input at image position 0."""


def empty_caption(config: GPTConfig) -> Int[Array, "1 P"]:
    """The caption without a token; the release was not trained with it."""
    return config.text_vocabulary + jnp.arange(config.text_slots, dtype=jnp.int32)[None]


def encode(config: GPTConfig, params: PyTree, text: Int[Array, "U P"]) -> Captions:
    """Reads captions.

    Args:
      config: sizes.
      params: as `init_params` lays them out.
      text: ids in [0, V), or V + j for slot j without a token.
    """
    x = _embed_text(config, params, text)
    x, last = x[:, :-1], x[:, -1]
    _, (keys, values) = jax.lax.scan(partial(_causal_layer, params), x, params["layers"])
    return Captions(keys, values, last)


def forward(
    config: GPTConfig, params: PyTree, text: Int[Array, "B P"], codes: Int[Array, "B I"]
) -> tuple[Float[Array, "B slots V"], Float[Array, "B I K"]]:
    """Logits of the caption's tokens after the first, and of every code.

    Args:
      config: sizes.
      params: as `init_params` lays them out.
      text: as for `encode`.
      codes: in raster order; the last one is only predicted.
    """
    cells = jnp.arange(config.image_length - 1)
    codes = _embed_codes(params, codes[:, :-1], cells)
    x = jnp.concatenate([_embed_text(config, params, text), codes], axis=1)  # B T D
    x, _ = jax.lax.scan(partial(_causal_layer, params), x, params["layers"])
    P = config.text_slots
    return _logits(params, x[:, : P - 1], "text"), _logits(params, x[:, P - 1 :], "image")


def init_cache(config: GPTConfig, images: int) -> Float[Array, "2 L B I N H"]:
    """Room for keys and values of the last slot and of all codes of that many images."""
    H = config.width // config.heads
    return jnp.zeros((2, config.depth, images, config.image_length, config.heads, H))


def decode_step(
    config: GPTConfig,
    params: PyTree,
    captions: Captions,
    cache: Float[Array, "2 L B I N H"],
    previous: Int[Array, " B"],
    position: Int[Array, ""],
) -> tuple[Float[Array, "B K"], Float[Array, "2 L B I N H"]]:
    """Logits of the next code of each image, as `forward` has them.

    Args:
      config: sizes.
      params: as `init_params` lays them out.
      captions: what `encode` read; B is a multiple of their number, images of one lie together.
      cache: what `init_cache`, or this function at position - 1, returned.
      previous: code at position - 1; ignored at position 0.
      position: raster position whose code is wanted.
    Returns:
      The logits, and the cache with this position.
    """
    codes = _embed_codes(params, previous[:, None], (position - 1)[None])
    last = jnp.repeat(captions.last, len(previous) // len(captions.last), axis=0)[:, None]
    x = jnp.where(position == 0, last, codes)  # B 1 D
    seen = jnp.arange(config.image_length) <= position

    def body(x, inputs):
        weights, old, of_caption = inputs

        def attend(qkv):
            query, *new = split_qkv(qkv.astype(jnp.float32))
            grown = tuple(
                jax.lax.dynamic_update_slice_in_dim(*pair, position, axis=1)
                for pair in zip(old, new, strict=True)
            )
            return _attend(query, of_caption, grown, seen).astype(qkv.dtype), grown

        return _layer(params, weights, x, attend)

    inputs = params["layers"], tuple(cache), (captions.keys, captions.values)
    x, grown = jax.lax.scan(body, x, inputs)
    return _logits(params, x, "image")[:, 0], jnp.stack(grown)


def init_params(config: GPTConfig, key: Key[Array, ""]) -> PyTree:
    """Initialises the parameters from N(0, 0.02^2) as the release does; layers are stacked."""
    D, V, K = config.width, config.text_vocabulary, config.codes
    kernels = ("qkv", "attention_out", "mlp_in", "mlp_out")
    keys = iter(jax.random.split(key, 7))

    def table(*shape):
        return normal(next(keys), shape, 0.02)

    return {
        "embed": {
            "text": table(V, D),
            "slot": table(config.text_slots, D),
            "code": table(K, D),
            "cell": table(config.image_length, D),
        },
        "layers": init_layers(
            next(keys),
            depth=config.depth,
            width=D,
            heads=config.heads,
            mlp=4 * D,
            stds=dict.fromkeys(kernels, 0.02),
        ),
        "head": {
            "norm": init_norm((D,)),
            "text": {"kernel": table(D, V)},
            "image": {"kernel": table(D, K)},
        },
    }


def _embed_text(config, params, text):
    embed = params["embed"]
    tokens = jnp.where(text < config.text_vocabulary, text, config.pad)
    return embed["text"][tokens] + embed["slot"][None]


def _embed_codes(params, codes, cells):
    embed = params["embed"]
    return embed["code"][codes] + embed["cell"][cells][None]


def _causal_layer(params, x, weights):
    """A layer over all positions; passes on its keys and values in float32."""

    def attend(qkv):
        query, key, value = split_qkv(qkv)
        mask = np.tri(x.shape[1], dtype=bool)
        kept = key.astype(jnp.float32), value.astype(jnp.float32)
        return dense(query, key, value, mask=mask), kept

    return _layer(params, weights, x, attend)


def _attend(query, of_caption, of_image, seen):
    """One softmax over a caption, which several images share, and the codes of each image."""
    (text_key, text_value), (key, value) = of_caption, of_image
    U, S, N, H = text_key.shape
    by_caption = query.reshape(U, -1, N, H)  # U W N H
    text_scores = jnp.einsum("UWNH,USNH->UWNS", by_caption, text_key)
    scores = jnp.einsum("BTNH,BSNH->BTNS", query, key)
    scores = jnp.where(seen[None, None, None], scores, -jnp.inf)
    scores = jnp.concatenate([text_scores.reshape(*query.shape[:3], S), scores], axis=-1)
    weights = jax.nn.softmax(scores * H**-0.5)
    text_weights = weights[..., :S].reshape(U, -1, N, S)
    from_text = jnp.einsum("UWNS,USNH->UWNH", text_weights, text_value).reshape(query.shape)
    return from_text + jnp.einsum("BTNS,BSNH->BTNH", weights[..., S:], value)


def _layer(params, weights, x, attend):
    gelu = partial(jax.nn.gelu, approximate=False)
    dtype = params["layers"]["qkv"]["kernel"].dtype
    return layer(weights, x, attend, dtype=dtype, gelu=gelu, epsilon=EPSILON)


def _logits(params, x, head):
    kernel = params["head"][head]["kernel"]
    x = layer_norm(params["head"]["norm"], x, epsilon=EPSILON)
    return (x.astype(kernel.dtype) @ kernel).astype(jnp.float32)
