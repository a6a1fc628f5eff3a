"""The progressive prior: codes in groups, each from the caption and the groups before it.

Letters: B batch, U captions, P text positions, I = G * G cells, G grid side, S cached positions,
n cells at a time, D width, N heads, H head size, V text vocabulary, K codebook, L layers.

    content   start of text, caption slots | codes of filled cells      lower L - query_depth layers
    queries                                  one for each wanted cell   upper query_depth layers

*Content* is causal by stage: a cell sees the text, the cells of its own stage and of all stages
before; text sees text. So the keys and values of a cell never change once it is filled, and are
cached. A *query* is a learned vector with the place of a cell. It looks at the content of the text
and of earlier stages, and predicts the code of its cell. No query sees another, so only those that
are wanted are computed. Drawing an image costs about one pass over all cells and layers, however
many stages it takes; in training one pass predicts every cell.

Source: ours, after Li et al. 2025 (ARPG, arXiv 2503.10568), with stages as in Fei et al. 2022.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree

from dalle_jax.errors import UserError
from dalle_jax.models.attention import dense
from dalle_jax.models.layers import init_norm, layer, layer_norm, layer_weights, project
from dalle_jax.models.prior_config import check_lengths, init_stack, init_tables


@dataclass(frozen=True, kw_only=True)
class ProgressiveConfig:
    """Sizes of the progressive prior."""

    width: int = 512
    """Width D of the residual streams; a multiple of heads."""
    depth: int = 12
    """Number of layers L, content and query layers together."""
    query_depth: int = 6
    """How many of them are query layers, at least 1; the others, at least 1, are content layers."""
    heads: int = 8
    """Attention heads N a layer."""
    text_vocabulary: int = 16384
    """Number of pieces V of the tokenizer; pads are extra."""
    text_length: int = 256
    """Text positions P: the start token and P - 1 caption slots."""
    grid: int = 32
    """Side G of the square of image codes."""
    codes: int = 8192
    """Size K of the image codebook."""
    mlp_ratio: int = 4
    """Width of the MLP, in multiples of the width D."""

    def __post_init__(self):
        for name, size in vars(self).items():
            least = 2 if name in ("text_length", "depth") else 1
            if size < least:
                raise UserError(f"{name} is {size}, but must be at least {least}")
        if self.query_depth >= self.depth:
            raise UserError(
                f"query_depth is {self.query_depth}, but must be below depth (={self.depth}), "
                "since the lower layers read the text and the filled cells"
            )
        if self.width % self.heads:
            raise UserError(f"width (={self.width}) must be a multiple of heads (={self.heads})")

    @property
    def image_length(self) -> int:
        """Cells I = G * G."""
        return self.grid**2

    @property
    def length(self) -> int:
        """All positions P + I."""
        return self.text_length + self.image_length

    @property
    def content_depth(self) -> int:
        """How many layers read the text and the filled cells."""
        return self.depth - self.query_depth


class KeysValues(NamedTuple):
    """What one layer remembers of text and filled cells."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]


class ProgressivePrior(nn.Module):
    """p(codes of some cells | text, codes of others), for cells in any order and any groups.

    Layers and first weights are those of the autoregressive prior, with one change: queries and
    keys are scaled to unit root mean square before attention ("QK norm", Dehghani et al. 2023). The
    content that the query layers see is normed once. All parameters of the layers are stacked on a
    first axis of size L, content layers first.
    """

    config: ProgressiveConfig
    dtype: DTypeLike = jnp.float32
    """Of matrix products and attention; the residual streams, norms and logits are float32."""
    scan: bool = False
    """Compile a layer of each kind once and loop over it: for deep models."""
    remat: bool = False
    """Keep only what enters each layer for the backward pass and compute the rest again."""
    sums: DTypeLike = jnp.float32
    """In which the gradients of kernels are summed, if dtype is of half precision."""
    constrain: Callable[[Array], Array] = lambda x: x
    """Says where the residual streams [B, T, D] lie, if they are spread over devices."""
    gather: Callable[[Array, Array], Array] = lambda table, ids: table[ids]
    """Takes rows [B, T, D] of an embedding table [V, D], which may be spread too."""

    def setup(self):
        """Declares the parameters: weight matrices are named kernel, their biases bias."""
        self.embed = self.param("embed", init_embeddings, self.config)
        self.layers = self.param("layers", init_stack, self.config)
        self.head = self.param("head", init_head, self.config)

    def __call__(
        self,
        text: Int[Array, "B slots"],
        codes: Int[Array, "B I"],
        stage: Int[Array, "B I"],
        *,
        scales: Float[Array, "L 2"] | None = None,
    ) -> Float[Array, "B I K"]:
        """Logits of every cell's code, given the caption and the cells of earlier stages.

        Args:
          text: P - 1 caption slots; ids in [0, V), or V + j for slot j without a token.
          codes: G * G codes in [0, K), in raster order.
          stage: the stage that fills each cell, from 0.
          scales: for float16: gradient scales of the attention and of the MLP branch of each layer,
            see `precision.grad_scale`.
        Returns:
          Unnormalised log-probabilities in float32.
        Raises:
          UserError: if text or codes do not have the lengths of the config.
        """
        check_lengths(self.config, text, codes)
        config, split = self.config, self.config.content_depth
        of_text = jnp.full((len(text), config.text_length), -1, stage.dtype)
        stages = jnp.concatenate([of_text, stage], axis=1)
        sees = stages[:, :, None] >= stages[:, None, :]  # B T S
        asks = stage[:, :, None] > stages[:, None, :]  # B I S

        def content(x, weights, scale):
            def attend(qkv):
                query, key, value = _split(qkv)
                return dense(_norm(query), _norm(key), value, mask=sees), None

            return self._layer(weights, self.constrain(x), attend, scale)[0]

        def query(x, weights, scale):
            known = self._remember(weights, memory)
            return self._query_layer(weights, self.constrain(x), known, asks, scale)

        x = jnp.concatenate([self._embed_text(text), self._embed_cells(codes)], axis=1)
        x = self._run(content, x, slice(0, split), scales)
        memory = layer_norm(self.head["memory_norm"], x).astype(self.dtype)
        x = self._embed_queries(jnp.arange(config.image_length)[None])
        x = jnp.broadcast_to(x, (len(text), *x.shape[1:]))
        return self._logits(self._run(query, x, slice(split, None), scales))

    def read(self, text: Int[Array, "U slots"]) -> list[KeysValues]:
        """Reads captions, once for all samples: keys and values [U, P, N, H] for each layer."""
        check_lengths(self.config, text)
        P = self.config.text_length
        mask = jnp.ones((1, P, P), bool)
        empty = [None] * self.config.depth
        return self._grow(empty, self._embed_text(text), lambda cache, new: (new, new), mask)

    def write(
        self,
        cache: list[KeysValues],
        codes: Int[Array, "B n"],
        cells: Int[Array, "B n"],
        *,
        at: Int[Array, ""] | int,
        count: Int[Array, ""] | int,
    ) -> list[KeysValues]:
        """Adds filled cells of one stage to the cache.

        Args:
          cache: S >= at + n positions for each layer.
          codes: of the cells, in [0, K).
          cells: their raster positions.
          at: position of the cache where they begin; all before it holds text or earlier stages.
          count: how many of them count, at most n: the rest are overwritten by the next stage.
        Returns:
          The cache with them.
        """

        def put(cache, new):
            grown = KeysValues(
                *(
                    jax.lax.dynamic_update_slice(old, x.astype(old.dtype), (0, at, 0, 0))
                    for old, x in zip(cache, new, strict=True)
                )
            )
            return grown, grown

        S = cache[0].key.shape[1]
        mask = jnp.arange(S)[None, None] < at + count
        mask = jnp.broadcast_to(mask, (1, cells.shape[1], S))
        return self._grow(cache, self._embed_cells(codes, cells), put, mask)

    def ask(
        self, cache: list[KeysValues], cells: Int[Array, "#B n"], *, count: Int[Array, ""] | int
    ) -> Float[Array, "B n K"]:
        """Logits of the codes of some cells.

        Args:
          cache: what `read` and `write` gave.
          cells: raster positions of the wanted cells, for each image or for all.
          count: how many positions of the cache count: text and filled cells.
        Returns:
          Unnormalised log-probabilities in float32.
        """
        B, S, *_ = cache[0].key.shape
        x = self._embed_queries(cells)
        x = jnp.broadcast_to(x, (B, *x.shape[1:]))
        mask = jnp.broadcast_to(jnp.arange(S)[None, None] < count, (1, x.shape[1], S))
        split = self.config.content_depth
        for weights, known in zip(self._unstacked(split, None), cache[split:], strict=True):
            x = self._query_layer(weights, x, known, mask)
        return self._logits(x)

    def leave_out(
        self, captions: list[KeysValues], codes: Int[Array, "B I"]
    ) -> Float[Array, "B I K"]:
        """Logits of every code of a full grid, each without a look at the code that stands there.

        Each quarter of the cells, every second one along rows and columns, is predicted from the
        other three, which count as one stage. Cost: about two passes over all cells and layers.

        Args:
          captions: what `read` gave, one for each image.
          codes: in [0, K).
        Returns:
          Unnormalised log-probabilities in float32.
        """
        P, cells = self.config.text_length, np.arange(self.config.image_length)
        row, column = np.divmod(cells, self.config.grid)
        quarter = row % 2 * 2 + column % 2
        logits = jnp.zeros((*codes.shape, self.config.codes))
        for q in np.unique(quarter):
            wanted, others = np.flatnonzero(quarter == q), np.flatnonzero(quarter != q)
            n = len(others)
            cache = jax.tree.map(lambda x, n=n: pad_cache(x, n), captions)
            if n:
                cells = jnp.broadcast_to(jnp.asarray(others)[None], (len(codes), n))
                cache = self.write(cache, codes[:, others], cells, at=P, count=n)
            found = self.ask(cache, jnp.asarray(wanted)[None], count=P + n)
            logits = logits.at[:, wanted].set(found)
        return logits

    def _grow(self, cache, x, put, mask):
        """Runs content x through its layers; `put` joins its keys and values to a layer's cache.

        `put` gives what is attended to, and what is remembered.
        """
        split, grown = self.config.content_depth, []
        for weights, known in zip(self._unstacked(0, split), cache[:split], strict=True):

            def attend(qkv, known=known):
                query, key, value = _split(qkv)
                seen, known = put(known, KeysValues(_norm(key), value))
                return dense(_norm(query), seen.key, seen.value, mask=mask), known

            x, known = self._layer(weights, x, attend)
            grown.append(known)
        memory = layer_norm(self.head["memory_norm"], x).astype(self.dtype)
        for weights, known in zip(self._unstacked(split, None), cache[split:], strict=True):
            grown.append(put(known, self._remember(weights, memory))[1])
        return grown

    def _remember(self, weights, memory):
        """Keys and values of content for one query layer."""
        weights = _part(weights["qkv"], slice(1, 3))
        key, value = _split(project(weights, memory, sums=self.sums))
        return KeysValues(_norm(key), value)

    def _query_layer(self, weights, x, known, mask, scale=None):
        def attend(query):
            return dense(_norm(query), known.key, known.value, mask=mask), None

        weights = {**weights, "qkv": _part(weights["qkv"], 0)}
        return self._layer(weights, x, attend, scale)[0]

    def _layer(self, weights, x, attend, scale=None):
        return layer(weights, x, attend, dtype=self.dtype, scale=scale, sums=self.sums)

    def _run(self, through, x, layers, scales):
        """Runs x through some layers of the stack, looped over or written out."""
        if self.remat:  # within a scan nothing could undo the recomputation, so it needs no guard
            through = jax.checkpoint(through, prevent_cse=not self.scan)
        stack = jax.tree.map(lambda array: array[layers], (self.layers, scales))
        if self.scan:
            return jax.lax.scan(lambda x, item: (through(x, *item), None), x, stack)[0]
        for i in range(len(range(*layers.indices(self.config.depth)))):
            x = through(x, *layer_weights(stack, i))
        return x

    def _unstacked(self, start, stop):
        return [layer_weights(self.layers, i) for i in range(self.config.depth)[start:stop]]

    def _embed_text(self, text):
        V = self.config.text_vocabulary
        token = self.gather(self.embed["text"], jnp.minimum(text, V - 1))
        token = token + self.embed["slot"][None]
        slots = jnp.where((text < V)[..., None], token, self.embed["pad"][None])
        start = jnp.broadcast_to(self.embed["start_of_text"], (len(text), 1, self.config.width))
        return jnp.concatenate([start, slots], axis=1)  # B P D

    def _embed_cells(self, codes, cells=None):
        if cells is None:
            cells = jnp.arange(self.config.image_length)[None]
        return self.gather(self.embed["code"], codes) + self._place(cells, "")

    def _embed_queries(self, cells):
        return self.embed["query"][None, None] + self._place(cells, "query_")

    def _place(self, cells, of):
        G = self.config.grid
        return self.embed[f"{of}row"][cells // G] + self.embed[f"{of}column"][cells % G]

    def _logits(self, x):
        x = layer_norm(self.head["norm"], x)
        return jnp.einsum("BTD,DK->BTK", x, self.head["image"]["kernel"])


def init_embeddings(key: Key[Array, ""], config: ProgressiveConfig) -> PyTree:
    """Tables of tokens and of places, all from N(0, 0.125 / sqrt(D))."""
    rows = {
        "text": config.text_vocabulary,
        "slot": config.text_length - 1,
        "pad": config.text_length - 1,
        "code": config.codes,
    } | dict.fromkeys(("row", "column", "query_row", "query_column"), config.grid)
    return init_tables(key, rows, single=("start_of_text", "query"), width=config.width)


def init_head(key: Key[Array, ""], config: ProgressiveConfig) -> PyTree:
    """The norm of what query layers see, the last norm, and a head of zeros."""
    del key  # a zero head: every code starts equally likely
    D = config.width
    norms = {name: init_norm((D,)) for name in ("memory_norm", "norm")}
    return norms | {"image": {"kernel": jnp.zeros((D, config.codes))}}


def init_params(config: ProgressiveConfig, key: Key[Array, ""]) -> PyTree:
    """Draws the first parameters, without tracing a pass."""
    return ProgressivePrior(config).init(key, method=lambda prior: prior.head)["params"]


def pad_cache(cached: Float[Array, "B S N H"], more: int) -> Float[Array, "B S2 N H"]:
    """Makes room for more positions behind those of a cache."""
    return jnp.pad(cached, ((0, 0), (0, more), (0, 0), (0, 0)))


def _split(qkv):
    return (qkv[:, :, i] for i in range(qkv.shape[2]))  # B T N H each


def _part(weights, which):
    """The weights of some of queries, keys and values."""
    return {"kernel": weights["kernel"][:, which], "bias": weights["bias"][which]}


def _norm(x):
    """Scales the vector of each head to a root mean square of 1, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype)
