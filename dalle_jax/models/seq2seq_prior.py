"""The prior of dalle-mini and dalle-mega: an encoder of captions and a decoder of image codes.

Both halves have NormFormer's norms, before and behind attention and inside a gated MLP; no product
has a bias. Each half looks tokens and positions up in tables of its own, and norms their sum.

Letters: U prompts, W images of each, B images, P caption slots, I = G * G codes, T and S positions,
D width, N heads, H head size, F mlp, V text vocabulary, K codebook, L layers.
Source: Dayma et al. 2021, "DALL-E Mini", and the authors' release; Lewis et al. 2019 (BART);
Shleifer et al. 2021 (NormFormer); Shazeer 2020 (GLU).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from dalle_jax.errors import UserError
from dalle_jax.models.layers import layer_norm, normal

EPSILON = 1e-5
"""Added to the variance in the norms."""


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """Sizes of the prior; the defaults are those of dalle-mega."""

    width: int = 2048
    """Width D of both halves."""
    heads: int = 32
    """Attention heads N."""
    mlp: int = 4096
    """Width F between the products of the MLP."""
    encoder_depth: int = 24
    """Layers of the encoder."""
    decoder_depth: int = 24
    """Layers of the decoder."""
    text_vocabulary: int = 50272
    """Text tokens V, start, end and pad included."""
    text_slots: int = 64
    """Slots P of a caption, for its start and end too."""
    grid: int = 16
    """Side G of the grid of codes."""
    codes: int = 16384
    """Codes K of the codec."""
    image_vocabulary: int = 16416
    """Rows of the decoder's table and of its head: the codes, its start, and rows that are never
    used."""
    start_of_image: int = 16384
    """Row that the decoder starts with (`decoder_start_token_id` in the release)."""

    start_of_text: int = 0
    """Token before a caption."""
    end_of_text: int = 2
    """Token behind a caption; the two alone are the empty one."""

    def __post_init__(self):
        for name, size in vars(self).items():
            if size < (not name.startswith(("start", "end"))):
                raise UserError(f"prior {name} is {size}; it must be at least 1")
        if self.width % self.heads:
            raise UserError(
                f"prior width is {self.width}, but must be a multiple of its {self.heads} heads"
            )
        if not max(self.codes - 1, self.start_of_image) < self.image_vocabulary:
            raise UserError(
                f"prior image_vocabulary is {self.image_vocabulary}, but must hold {self.codes} "
                f"codes and the start {self.start_of_image}"
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
    """What the decoder looks at: keys and values of each of its layers."""

    keys: Float[Array, "L U P N H"]
    values: Float[Array, "L U P N H"]
    real: Bool[Array, "U 1 P"]
    """Slots that hold a token."""


def empty_caption(config: Seq2SeqConfig) -> Int[Array, "1 P"]:
    """The caption without a token, start and end alone."""
    slots = jnp.arange(config.text_slots, dtype=jnp.int32)
    ends = jnp.where(slots, config.end_of_text, config.start_of_text)
    return jnp.where(slots > 1, config.text_vocabulary + slots, ends)[None]


def encode(config: Seq2SeqConfig, params: PyTree, text: Int[Array, "U P"]) -> Captions:
    """Reads captions.

    Args:
      config: sizes.
      params: as `init_params` lays them out.
      text: ids in [0, V), or V + j for slot j without a token.
    Source: Dayma et al. 2021.
    """
    real = (text < config.text_vocabulary)[:, None]
    x = _embed(params["encoder"], jnp.where(real[:, 0], text, 0), jnp.arange(text.shape[1]))

    def body(x, weights):
        def attend(part, y):
            return _attend(*(_heads(config, part[name], y) for name in "qkv"), real)

        return _layer(weights, x, {"self": attend}), None

    x, _ = jax.lax.scan(body, x, params["encoder"]["layers"])
    x = _norm(params["encoder"]["norm"], x)
    cross = params["decoder"]["layers"]["cross"]
    keys, values = (
        jax.lax.map(lambda weights: _heads(config, weights, x), cross[name]) for name in "kv"
    )
    return Captions(keys, values, real)


def forward(
    config: Seq2SeqConfig, params: PyTree, text: Int[Array, "B P"], codes: Int[Array, "B I"]
) -> Float[Array, "B I K"]:
    """Logits of every code, given the caption and all codes before it.

    Args:
      config: sizes.
      params: as `init_params` lays them out.
      text: as for `encode`.
      codes: in raster order; the last one is only predicted.
    """
    captions = encode(config, params, text)
    I = config.image_length  # noqa: E741
    start = jnp.full_like(codes[:, :1], config.start_of_image)
    tokens = jnp.concatenate([start, codes[:, :-1]], axis=1)
    x = _embed(params["decoder"], tokens, jnp.arange(I))
    causal = jnp.tri(I, dtype=bool)[None]

    def body(x, layer):
        weights, keys, values = layer

        def attend(part, y):
            return _attend(*(_heads(config, part[name], y) for name in "qkv"), causal)

        def look(part, y):
            return _attend(_heads(config, part["q"], y), keys, values, captions.real)

        return _layer(weights, x, {"self": attend, "cross": look}), None

    layers = params["decoder"]["layers"], captions.keys, captions.values
    x, _ = jax.lax.scan(body, x, layers)
    return _logits(config, params, x)


def init_cache(config: Seq2SeqConfig, images: int) -> Float[Array, "2 L B I N H"]:
    """Room for keys and values of all codes of that many images."""
    H = config.width // config.heads
    return jnp.zeros((2, config.decoder_depth, images, config.image_length, config.heads, H))


def decode_step(
    config: Seq2SeqConfig,
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
    B, U = len(previous), captions.real.shape[0]
    tokens = jnp.where(position == 0, config.start_of_image, previous)[:, None]
    x = _embed(params["decoder"], tokens, position[None])
    seen = (jnp.arange(config.image_length) <= position)[None, None]

    def body(x, layer):
        weights, (own_keys, own_values), keys, values = layer
        grown = []

        def attend(part, y):
            query = _heads(config, part["q"], y)
            for name, old in (("k", own_keys), ("v", own_values)):
                new = _heads(config, part[name], y)
                grown.append(jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1))
            return _attend(query, *grown, seen)

        def look(part, y):
            query = _heads(config, part["q"], y)
            by_caption = query.reshape(U, B // U, *query.shape[2:])
            return _attend(by_caption, keys, values, captions.real).reshape(query.shape)

        x = _layer(weights, x, {"self": attend, "cross": look})
        return x, tuple(grown)

    layers = params["decoder"]["layers"], tuple(cache), captions.keys, captions.values
    x, grown = jax.lax.scan(body, x, layers)
    return _logits(config, params, x)[:, 0], jnp.stack(grown)


def init_params(config: Seq2SeqConfig, key: Key[Array, ""]) -> PyTree:
    """Initialises the parameters from N(0, 0.02^2) as the release does; layers are stacked."""
    D, F = config.width, config.mlp
    kernels = iter(jax.random.split(key, 32))

    def kernel(*shape):
        return {"kernel": normal(next(kernels), shape, 0.02)}

    def norm(*shape):
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    def attention(L):
        return {
            "norm_in": {"bias": jnp.zeros((L, D))},
            **{name: kernel(L, D, D) for name in ("q", "k", "v", "out")},
            "norm_out": norm(L, D),
        }

    def half(L, rows, length, parts):
        mlp = {
            "norm_in": {"bias": jnp.zeros((L, D))},
            "gate": kernel(L, D, F),
            "value": kernel(L, D, F),
            "norm_hidden": {"bias": jnp.zeros((L, F))},
            "out": kernel(L, F, D),
        }
        return {
            "token": normal(next(kernels), (rows, D), 0.02),
            "position": normal(next(kernels), (length, D), 0.02),
            "norm_in": norm(D),
            "layers": {part: attention(L) for part in parts} | {"mlp": mlp},
            "norm": {"bias": jnp.zeros(D)},
        }

    text, image = config.text_vocabulary, config.image_vocabulary
    return {
        "encoder": half(config.encoder_depth, text, config.text_slots, ("self",)),
        "decoder": half(config.decoder_depth, image, config.image_length, ("self", "cross")),
        "head": kernel(D, image),
    }


def _embed(half, tokens, positions):
    x = half["token"][tokens] + half["position"][positions][None]  # B T D
    return _norm(half["norm_in"], x)


def _layer(weights, x, attends):
    for name, attend in attends.items():
        part = weights[name]
        y = attend(part, _norm(part["norm_in"], x))
        x = x + _norm(part["norm_out"], _linear(part["out"], y.reshape(x.shape)))
    part = weights["mlp"]
    y = _norm(part["norm_in"], x)
    y = jax.nn.gelu(_linear(part["gate"], y), approximate=False) * _linear(part["value"], y)
    return x + _linear(part["out"], _norm(part["norm_hidden"], y))


def _heads(config, weights, x):
    return _linear(weights, x).reshape(*x.shape[:2], config.heads, -1)  # B T N H


def _attend(query, key, value, mask):
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


def _norm(weights: dict[str, Any], x: Array) -> Array:
    """Layer norm, some of them without a gain: products that follow have it."""
    gain = {"scale": jnp.ones_like(weights["bias"])}
    return layer_norm(gain | weights, x, epsilon=EPSILON)


def _linear(weights, x):
    kernel = weights["kernel"]
    return (x.astype(kernel.dtype) @ kernel).astype(jnp.float32)


def _logits(config, params, x):
    logits = _linear(params["head"], _norm(params["decoder"]["norm"], x))
    return logits[..., : config.codes]
