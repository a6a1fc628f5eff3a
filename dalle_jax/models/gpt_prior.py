"""The priors of minDALL-E and of ruDALL-E Malevich: GPTs over caption tokens and image codes.

Positions are learned, norms come first in each branch, and text and codes have tables and heads of
their own. There is no start of the image: the last caption slot predicts code 0, and slots without
a token hold a pad, which is looked at like any other.

    position   0 .. S-1        S              S+1 .. T-1
    input      slots           last slot      code 0 .. I-2
    predicts   the slot after  code 0         code 1 .. I-1

                     minDALL-E           Malevich v3          Malevich v2
    attention        dense               row, column, conv    the same, one position earlier
    conv             -                   a square window      one that wraps around the edges
    text before S    slot 0 .. P-2       slot 0 .. P-2        a start, then slot 0 .. P-2
    pad              one                 one for each slot    one for each slot
    codes lie at     cells               rows and columns     rows and columns
    GELU             exact               by tanh              by tanh

Malevich norms what a branch adds, too ("sandwich"), and has two norms before its heads. In v3 the
last slot counts as text; in v2 as the position of the image before code 0, as in the paper, so
that a code is predicted with the mask of its own cell.

Letters: U prompts, W images of each, B images, P caption slots, I = G * G codes, T positions,
D width, N heads, H head size, V text vocabulary, K codebook, L layers.
Source: Kim et al. 2021, "minDALL-E on Conceptual Captions"; ruDALL-E (2021, 2022); the authors'
releases; Radford et al. 2019 (GPT-2); Ding et al. 2021 (CogView: the sandwich). Left out are
Malevich's ways to stay within float16, which change no result in float32.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from dalle_jax.errors import UserError
from dalle_jax.models.attention import dense
from dalle_jax.models.layers import (
    SANDWICH,
    init_layers,
    init_norm,
    layer,
    layer_norm,
    normal,
    split_qkv,
)
from dalle_jax.models.masks import attention_mask, layer_kinds, window_mask

EPSILON = 1e-5
"""Added to the variance in the norms."""
START, END = 2, 3
"""Text tokens that Malevich has built in."""
Variant = Literal["mindalle", "malevich-v2", "malevich-v3"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of the prior; the defaults are those of minDALL-E."""

    variant: Variant = "mindalle"
    """Whose prior it is."""
    width: int = 1536
    """Width D; the MLP is four times as wide."""
    depth: int = 42
    """Layers L."""
    heads: int = 24
    """Attention heads N."""
    text_vocabulary: int = 16384
    """Text tokens V, minDALL-E's pad included; Malevich's table also has a pad for each slot."""
    text_slots: int = 64
    """Slots P of a caption."""
    grid: int = 16
    """Side G of the grid of codes."""
    codes: int = 16384
    """Codes K of the codec."""
    pad: int | None = None
    """Token of slots that a caption leaves empty; None for a pad of each slot, as Malevich has."""

    def __post_init__(self):
        if self.variant not in get_args(Variant):
            raise UserError(
                f"prior variant is {self.variant!r}, but must be one of {list(get_args(Variant))}"
            )
        sizes = {name: size for name, size in vars(self).items() if name not in ("variant", "pad")}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"prior {name} is {size}; it must be at least 1")
        if self.width % self.heads:
            raise UserError(
                f"prior width is {self.width}, but must be a multiple of its {self.heads} heads"
            )
        if self.is_malevich:
            if self.pad is not None:
                raise UserError(f"prior pad is {self.pad}, but Malevich has one for each slot")
        elif self.pad is None or not 0 <= self.pad < self.text_vocabulary:
            raise UserError(
                f"prior pad is {self.pad}, but must be a token below {self.text_vocabulary}"
            )

    @property
    def is_malevich(self) -> bool:
        """Whether it is one of ruDALL-E's."""
        return self.variant != "mindalle"

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
    """The caption without a token; the releases were not trained with it."""
    text = config.text_vocabulary + jnp.arange(config.text_slots, dtype=jnp.int32)
    if config.is_malevich:
        text = jnp.concatenate([jnp.array([START, END], jnp.int32), text[2:]])
    return text[None]


def encode(config: GPTConfig, params: PyTree, text: Int[Array, "U P"]) -> Captions:
    """Reads captions.

    Args:
      config: sizes.
      params: as `init_params` lays them out.
      text: ids in [0, V), or V + j for slot j without a token.
    """
    x = _embed_text(config, params, text)
    x, last = x[:, :-1], x[:, -1]
    causal = jnp.tri(x.shape[1], dtype=bool)[None]
    _, (keys, values) = _layers(config, params, x, causal, jnp.zeros(config.depth, int))
    return Captions(keys, values, last)


def forward(
    config: GPTConfig, params: PyTree, text: Int[Array, "B P"], codes: Int[Array, "B I"]
) -> tuple[Float[Array, "B slots V"], Float[Array, "B I K"]]:
    """Logits of the text after its first position, and of every code.

    Args:
      config: sizes.
      params: as `init_params` lays them out.
      text: as for `encode`.
      codes: in raster order; the last one is only predicted.
    """
    cells = jnp.arange(config.image_length - 1)
    codes = _embed_codes(config, params, codes[:, :-1], cells)
    x = jnp.concatenate([_embed_text(config, params, text), codes], axis=1)  # B T D
    S = x.shape[1] - config.image_length
    of_image, of_layer = _image_masks(config)
    masks = np.tile(np.tri(x.shape[1], dtype=bool), (len(of_image), 1, 1))
    masks[:, S:, S:] = of_image
    x, _ = _layers(config, params, x, jnp.asarray(masks), jnp.asarray(of_layer))
    return _logits(params, x[:, :S], "text"), _logits(params, x[:, S:], "image")


def init_cache(config: GPTConfig, images: int) -> Float[Array, "L I 2 B N H"]:
    """Room for keys and values of the last slot and of all codes of that many images."""
    H = config.width // config.heads
    return jnp.zeros((config.depth, config.image_length, 2, images, config.heads, H))


def decode_step(
    config: GPTConfig,
    params: PyTree,
    captions: Captions,
    cache: Float[Array, "L I 2 B N H"],
    previous: Int[Array, " B"],
    position: Int[Array, ""],
) -> tuple[Float[Array, "B K"], Float[Array, "L I 2 B N H"]]:
    """Logits of the next code of each image, as `forward` has them.

    Of the cache, a layer reads only what its mask lets this position see.

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
    codes = _embed_codes(config, params, previous[:, None], (position - 1)[None])
    last = jnp.repeat(captions.last, len(previous) // len(captions.last), axis=0)[:, None]
    x = jnp.where(position == 0, last, codes)  # B 1 D
    masks, of_layer = _image_masks(config)
    places, counts = (jnp.asarray(table)[:, position] for table in _seen_places(masks))

    def body(carry, inputs):
        x, cache = carry
        weights, of_caption, kind, i = inputs

        def attend(qkv):
            query, *new = split_qkv(qkv.astype(jnp.float32))
            new = jnp.stack(new)[None, None, :, :, 0]  # L I 2 B N H, of one layer and position
            grown = jax.lax.dynamic_update_slice(cache, new, (i, position, 0, 0, 0, 0))
            seen = jnp.arange(places.shape[1]) < counts[kind]
            of_image = grown[i, places[kind]].swapaxes(0, 1)  # 2 S B N H
            return _attend(query, of_caption, of_image, seen).astype(qkv.dtype), grown

        return _layer(config, params, weights, x, attend), None

    read = captions.keys, captions.values
    inputs = params["layers"], read, jnp.asarray(of_layer), jnp.arange(config.depth)
    (x, cache), _ = jax.lax.scan(body, (x, cache), inputs)
    return _logits(params, x, "image")[:, 0], cache


def init_params(config: GPTConfig, key: Key[Array, ""]) -> PyTree:
    """Initialises the parameters from N(0, 0.02^2) as minDALL-E does; layers are stacked."""
    D, V, K, P, G = (
        config.width, config.text_vocabulary, config.codes, config.text_slots, config.grid
    )  # fmt: skip
    keys = iter(jax.random.split(key, 8))

    def table(*shape):
        return normal(next(keys), shape, 0.02)

    def head(size):
        bias = {"bias": jnp.zeros(size)} if config.is_malevich else {}
        return {"kernel": table(D, size)} | bias

    layers = init_layers(
        next(keys),
        depth=config.depth,
        width=D,
        heads=config.heads,
        mlp=4 * D,
        stds=dict.fromkeys(("qkv", "attention_out", "mlp_in", "mlp_out"), 0.02),
    )
    norms = {"norm": init_norm((D,))}
    if config.is_malevich:
        V, P = V + P, P + 1  # pads; room for the start of v2, which v3 has too
        layers |= {name: init_norm((config.depth, D)) for name in SANDWICH}
        norms["second_norm"] = init_norm((D,))
        places = {"row": table(G, D), "column": table(G, D)}
    else:
        places = {"cell": table(config.image_length, D)}
    return {
        "embed": {"text": table(V, D), "slot": table(P, D), "code": table(K, D)} | places,
        "layers": layers,
        "head": norms | {"text": head(V), "image": head(K)},
    }


def _image_masks(config):
    """Masks [kinds, I, I] of the last slot and all codes, and the kind of each layer."""
    G, L = config.grid, config.depth
    if not config.is_malevich:
        return np.tri(config.image_length, dtype=bool)[None], np.zeros(L, int)
    names = list(layer_kinds(L))
    if (L - 2) % 4 == 0:
        names[-1] = "column"  # which comes before conv in the release
    image_only = {"text_length": 1, "grid": G}
    masks = {kind: attention_mask(kind, **image_only)[1:, 1:] for kind in ("row", "column")}
    masks["conv"] = window_mask(grid=G, wraps=config.variant == "malevich-v2")
    stacked = np.stack(list(masks.values()))
    if config.variant == "malevich-v3":  # the last slot is text: all see it, codes move by one
        moved = np.tile(np.tri(config.image_length, dtype=bool), (len(stacked), 1, 1))
        moved[:, 1:, 1:] = stacked[:, :-1, :-1]
        stacked = moved
    return stacked, np.array([list(masks).index(name) for name in names])


def _seen_places(masks):
    """Of each kind and position, the positions that it sees [kinds, I, S], and how many."""
    counts = masks.sum(axis=-1)
    places = np.argsort(~masks, axis=-1, kind="stable")  # those first, in order
    return places[..., : counts.max()], counts


def _embed_text(config, params, text):
    embed = params["embed"]
    if config.variant == "malevich-v2":
        text = jnp.pad(text, ((0, 0), (1, 0)), constant_values=START)
    if not config.is_malevich:
        text = jnp.where(text < config.text_vocabulary, text, config.pad)
    return embed["text"][text] + embed["slot"][None, : text.shape[1]]


def _embed_codes(config, params, codes, cells):
    embed, G = params["embed"], config.grid
    if config.is_malevich:
        places = embed["row"][cells // G] + embed["column"][cells % G]
    else:
        places = embed["cell"][cells]
    return embed["code"][codes] + places[None]


def _layers(config, params, x, masks, of_layer):
    """All layers over all positions; passes on their keys and values in float32."""

    def body(x, inputs):
        weights, kind = inputs

        def attend(qkv):
            query, key, value = split_qkv(qkv)
            kept = key.astype(jnp.float32), value.astype(jnp.float32)
            return dense(query, key, value, mask=masks[kind]), kept

        return _layer(config, params, weights, x, attend)

    return jax.lax.scan(body, x, (params["layers"], of_layer))


def _attend(query, of_caption, of_image, seen):
    """One softmax over a caption, which several images share, and codes [S, B, N, H] of each."""
    (text_key, text_value), (key, value) = of_caption, of_image
    U, S, N, H = text_key.shape
    by_caption = query.reshape(U, -1, N, H)  # U W N H
    text_scores = jnp.einsum("UWNH,USNH->UWNS", by_caption, text_key)
    scores = jnp.einsum("BTNH,SBNH->BTNS", query, key)
    scores = jnp.where(seen[None, None, None], scores, -jnp.inf)
    scores = jnp.concatenate([text_scores.reshape(*query.shape[:3], S), scores], axis=-1)
    weights = jax.nn.softmax(scores * H**-0.5)
    text_weights = weights[..., :S].reshape(U, -1, N, S)
    from_text = jnp.einsum("UWNS,USNH->UWNH", text_weights, text_value).reshape(query.shape)
    return from_text + jnp.einsum("BTNS,SBNH->BTNH", weights[..., S:], value)


def _layer(config, params, weights, x, attend):
    gelu = partial(jax.nn.gelu, approximate=config.is_malevich)
    dtype = params["layers"]["qkv"]["kernel"].dtype
    return layer(weights, x, attend, dtype=dtype, gelu=gelu, epsilon=EPSILON)


def _logits(params, x, name):
    head = params["head"]
    for norm in ("norm", "second_norm"):
        if norm in head:
            x = layer_norm(head[norm], x, epsilon=EPSILON)
    kernel = head[name]["kernel"]
    logits = (x.astype(kernel.dtype) @ kernel).astype(jnp.float32)
    return logits + head[name]["bias"][None, None] if "bias" in head[name] else logits
