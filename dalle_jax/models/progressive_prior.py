"""The progressive prior: codes in groups, each from the caption and the groups before it.

Letters: B batch, U captions, P text positions, I = G * G cells, G grid side, S cached positions,
n cells at a time, D width, N heads, H head size, V text vocabulary, K codebook, L layers.

    content   start of text, caption slots | codes of filled cells      lower L - query_depth layers
    queries                                  one for each wanted cell   upper query_depth layers

*Content* is causal by stage: a cell sees the text, the cells of its own stage and of all stages
before; text sees text. So the keys and values of a cell never change once it is filled, and are
cached. A *query* is a learned vector with the position of a cell. It attends to the content of the
text and of earlier stages, and predicts the code of its cell. No query sees another, so only the
wanted ones are computed. An image costs about one pass over all cells and layers, however many
stages it takes; in training one pass predicts every cell.

Source: ours, after Li et al. 2025 (ARPG, arXiv 2503.10568), with stages as in Fei et al. 2022.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from dalle_jax.models.attention import dense
from dalle_jax.models.layers import init_norm, layer_norm, project, split_qkv
from dalle_jax.models.prior_config import ProgressiveConfig, check_lengths
from dalle_jax.models.transformer import PriorTransformer, init_embeddings, init_prior, init_stack


class KeysValues(NamedTuple):
    """The cache of one layer: keys and values of text and filled cells."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]


class ProgressivePrior(PriorTransformer):
    """p(codes of some cells | text, codes of others), for cells in any order and any groups.

    Layers and first weights are those of the autoregressive prior, with one change: queries and
    keys are scaled to unit root mean square before attention ("QK norm", Dehghani et al. 2023). The
    content that the query layers see is normed once. All parameters of the layers are stacked on a
    first axis of size L, content layers first.
    """

    config: ProgressiveConfig

    def setup(self):
        """Declares the parameters: weight matrices are named kernel, their biases bias."""
        self.embed = self.param("embed", _init_embed, self.config)
        self.layers = self.param("layers", init_stack, self.config)
        self.head = self.param("head", _init_head, self.config)

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

        def content_layer(x, layer, is_last, kinds):
            def attend(qkv):
                query, key, value = split_qkv(qkv)
                return dense(_qk_norm(query), _qk_norm(key), value, mask=sees), None

            weights, scale = layer
            return self.run_layer(weights, self.constrain(x), attend, scale)[0]

        def query_layer(x, layer, is_last, kinds):
            weights, scale = layer
            cache = self._content_cache(weights, content)
            return self._query_layer(weights, self.constrain(x), cache, asks, scale)

        def layers(start, stop):
            return jax.tree.map(lambda array: array[start:stop], (self.layers, scales))

        x = jnp.concatenate([self.embed_text(text), self._embed_codes(codes)], axis=1)
        x = self.run_layers(content_layer, x, layers(0, split))
        content = self._content(x)
        x = self._embed_queries(jnp.arange(config.image_length)[None])
        x = jnp.broadcast_to(x, (len(text), *x.shape[1:]))
        return self.logits(self.run_layers(query_layer, x, layers(split, None)))

    def prefill(self, text: Int[Array, "U slots"]) -> list[KeysValues]:
        """Caches captions, once for all samples: keys and values [U, P, N, H] for each layer."""
        check_lengths(self.config, text)
        P = self.config.text_length
        mask = jnp.ones((1, P, P), bool)
        empty = [None] * self.config.depth
        return self._extend(empty, self.embed_text(text), lambda cache, new: (new, new), mask)

    def extend(
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
          at: position of the cache where they start; all before it holds text or earlier stages.
          count: how many of them are valid, at most n: the next stage overwrites the others.
        Returns:
          The extended cache.
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
        return self._extend(cache, self._embed_codes(codes, cells), put, mask)

    def predict(
        self, cache: list[KeysValues], cells: Int[Array, "#B n"], *, count: Int[Array, ""] | int
    ) -> Float[Array, "B n K"]:
        """Logits of the codes of some cells.

        Args:
          cache: from `prefill` and `extend`.
          cells: raster positions of the cells, for each image or for all.
          count: how many positions of the cache are valid: text and filled cells.
        Returns:
          Unnormalised log-probabilities in float32.
        """
        B, S, *_ = cache[0].key.shape
        x = self._embed_queries(cells)
        x = jnp.broadcast_to(x, (B, *x.shape[1:]))
        mask = jnp.broadcast_to(jnp.arange(S)[None, None] < count, (1, x.shape[1], S))
        split = self.config.content_depth
        for weights, cached in zip(self.unstacked(split), cache[split:], strict=True):
            x = self._query_layer(weights, x, cached, mask)
        return self.logits(x)

    def predict_left_out(
        self, captions: list[KeysValues], codes: Int[Array, "B I"]
    ) -> Float[Array, "B I K"]:
        """Logits of every code of a full grid, each without that code itself.

        Each quarter of the cells, every second one along rows and columns, is predicted from the
        other three, which are one stage. Cost: about two passes over all cells and layers.

        Args:
          captions: cache from `prefill`, one for each image.
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
                cache = self.extend(cache, codes[:, others], cells, at=P, count=n)
            predicted = self.predict(cache, jnp.asarray(wanted)[None], count=P + n)
            logits = logits.at[:, wanted].set(predicted)
        return logits

    def _extend(self, cache, x, put, mask):
        """Runs content x through its layers; `put` joins its keys and values to a layer's cache.

        `put` gives what is attended to, and what is cached.
        """
        split, extended = self.config.content_depth, []
        for weights, cached in zip(self.unstacked(0, split), cache[:split], strict=True):

            def attend(qkv, cached=cached):
                query, key, value = split_qkv(qkv)
                seen, cached = put(cached, KeysValues(_qk_norm(key), value))
                return dense(_qk_norm(query), seen.key, seen.value, mask=mask), cached

            x, cached = self.run_layer(weights, x, attend)
            extended.append(cached)
        content = self._content(x)
        for weights, cached in zip(self.unstacked(split), cache[split:], strict=True):
            extended.append(put(cached, self._content_cache(weights, content))[1])
        return extended

    def _content(self, x):
        """What query layers see of the output of the content layers."""
        return layer_norm(self.head["memory_norm"], x).astype(self.dtype)

    def _content_cache(self, weights, content):
        """Keys and values of content for one query layer."""
        weights = _select_qkv(weights["qkv"], slice(1, 3))
        key, value = split_qkv(project(weights, content, grad_dtype=self.grad_dtype))
        return KeysValues(_qk_norm(key), value)

    def _query_layer(self, weights, x, cached, mask, scale=None):
        def attend(query):
            return dense(_qk_norm(query), cached.key, cached.value, mask=mask), None

        weights = {**weights, "qkv": _select_qkv(weights["qkv"], 0)}
        return self.run_layer(weights, x, attend, scale)[0]

    def _embed_codes(self, codes, cells=None):
        if cells is None:
            cells = jnp.arange(self.config.image_length)[None]
        return self.gather(self.embed["code"], codes) + self.embed_cells(cells)

    def _embed_queries(self, cells):
        return self.embed["query"][None, None] + self.embed_cells(cells, "query_")


def init_params(config: ProgressiveConfig, key: Key[Array, ""]) -> PyTree:
    """Initialises the parameters."""
    return init_prior(ProgressivePrior(config), key)


def _init_embed(key, config):
    tables = dict.fromkeys(("query_row", "query_column"), config.grid)
    return init_embeddings(key, config, tables=tables, vectors=("start_of_text", "query"))


def _init_head(key, config):
    del key  # a zero head: every code is equally likely at first
    D = config.width
    norms = {name: init_norm((D,)) for name in ("memory_norm", "norm")}
    return norms | {"image": {"kernel": jnp.zeros((D, config.codes))}}


def pad_cache(cached: Float[Array, "B S N H"], more: int) -> Float[Array, "B S2 N H"]:
    """Makes room for more positions behind those of a cache."""
    return jnp.pad(cached, ((0, 0), (0, more), (0, 0), (0, 0)))


def _select_qkv(weights, which):
    """The weights of some of queries, keys and values."""
    return {"kernel": weights["kernel"][:, which], "bias": weights["bias"][which]}


def _qk_norm(x):
    """Scales the vector of each head to a root mean square of 1, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype)
