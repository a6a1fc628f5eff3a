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

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, Key, PyTree

from dalle_jax.models.attention import dense
from dalle_jax.models.image_parts import map_images
from dalle_jax.models.layers import init_norm, layer_norm, project, split_qkv
from dalle_jax.models.prior_config import ProgressiveConfig, check_lengths
from dalle_jax.models.transformer import PriorTransformer, init_embeddings, init_prior, init_stack

LOGITS = 2**22  # computed at once for several images while stages are sampled: 16 MB of float32


class KeysValues(NamedTuple):
    """The cache of one layer: keys and values of text and filled cells.

    Positions come last: attention multiplies the arrays as they lie, and a TPU, which pads the last
    axis to a multiple of 128, would keep heads of 64 numbers in twice their size.
    """

    key: Float[Array, "B N H S"]
    value: Float[Array, "B N H S"]


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
            weights = _split_queries(weights)
            key, value = self._content_keys_values(weights, content)
            attend = partial(dense, key=key, value=value, mask=asks)
            return self._query_layer(weights, self.constrain(x), attend, scale)

        def layers(start, stop):
            return jax.tree.map(lambda array: array[start:stop], (self.layers, scales))

        x = jnp.concatenate([self.embed_text(text), self._embed_codes(codes)], axis=1)
        x = self.run_layers(content_layer, x, layers(0, split))
        content = self._content(x)
        x = self._embed_queries(jnp.arange(config.image_length)[None])
        x = jnp.broadcast_to(x, (len(text), *x.shape[1:]))
        return self.logits(self.run_layers(query_layer, x, layers(split, None)))

    def layers_for_stages(self) -> list[PyTree]:
        """The weights of the layers, one by one, for the passes over some cells.

        Kernels are matrices, and in the place of "qkv" a query layer has "query" and "content",
        which queries and content are multiplied with. To be made once for all stages: cut from
        the stacks in each of them, weights are copied each time.
        """
        split, layers = self.config.content_depth, self.unstacked()
        layers[split:] = map(_split_queries, layers[split:])

        def flat(weights):
            if "kernel" not in weights:
                return weights  # of a norm
            return {**weights, "kernel": weights["kernel"].reshape(-1, weights["bias"].size)}

        return [{name: flat(part) for name, part in weights.items()} for weights in layers]

    def prefill(
        self, text: Int[Array, "U slots"], *, layers: Sequence[PyTree] | None = None
    ) -> list[KeysValues]:
        """Caches captions, once for all samples: keys and values [U, N, H, P] for each layer.

        Args:
          text: P - 1 caption slots; ids in [0, V), or V + j for slot j without a token.
          layers: from `layers_for_stages`; None to make them.
        """
        check_lengths(self.config, text)
        empty = [None] * self.config.depth
        x, P = self.embed_text(text), self.config.text_length
        return self._extend(layers, empty, x, lambda cache, new: new, count=P)

    def extend(
        self,
        cache: list[KeysValues],
        codes: Int[Array, "B n"],
        cells: Int[Array, "B n"],
        *,
        at: Int[Array, ""] | int,
        count: Int[Array, ""] | int,
        layers: Sequence[PyTree] | None = None,
    ) -> list[KeysValues]:
        """Adds filled cells of one stage to the cache.

        Args:
          cache: S >= at + n positions for each layer.
          codes: of the cells, in [0, K).
          cells: their raster positions.
          at: position of the cache where they start; all before it holds text or earlier stages.
          count: how many of them are valid, at most n: the next stage overwrites the others.
          layers: from `layers_for_stages`; None to make them.
        Returns:
          The extended cache.
        """

        def put(cache, new):
            return KeysValues(
                *(
                    jax.lax.dynamic_update_slice(old, x.astype(old.dtype), (0, 0, 0, at))
                    for old, x in zip(cache, new, strict=True)
                )
            )

        x = self._embed_codes(codes, cells)
        return self._extend(layers, cache, x, put, count=at + count)

    def predict(
        self,
        cache: list[KeysValues],
        cells: Int[Array, "#B n"],
        *,
        count: Int[Array, ""] | int,
        layers: Sequence[PyTree] | None = None,
    ) -> Float[Array, "B n K"]:
        """Logits of the codes of some cells.

        Args:
          cache: from `prefill` and `extend`.
          cells: raster positions of the cells, for each image or for all.
          count: how many positions of the cache are valid: text and filled cells.
          layers: from `layers_for_stages`; None to make them.
        Returns:
          Unnormalised log-probabilities in float32.
        """
        x = self._embed_queries(cells)
        x = jnp.broadcast_to(x, (len(cache[0].key), *x.shape[1:]))
        split = self.config.content_depth
        layers = self.layers_for_stages() if layers is None else layers
        for weights, cached in zip(layers[split:], cache[split:], strict=True):
            x = self._query_layer(weights, x, partial(_attend, cached=cached, count=count))
        return self.logits(x)

    def predict_left_out(
        self,
        captions: list[KeysValues],
        codes: Int[Array, "B I"],
        *,
        layers: Sequence[PyTree] | None = None,
    ) -> Float[Array, "B I K"]:
        """Logits of every code of a full grid, each without that code itself.

        Each quarter of the cells, every second one along rows and columns, is predicted from the
        other three, which are one stage. Cost: about two passes over all cells and layers.

        Args:
          captions: cache from `prefill`, one for each image.
          codes: in [0, K).
          layers: from `layers_for_stages`; None to make them.
        Returns:
          Unnormalised log-probabilities in float32.
        """
        layers = self.layers_for_stages() if layers is None else layers
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
                sizes = {"at": P, "count": n, "layers": layers}
                cache = self.extend(cache, codes[:, others], cells, **sizes)
            asked = jnp.asarray(wanted)[None]
            predicted = self.predict(cache, asked, count=P + n, layers=layers)
            logits = logits.at[:, wanted].set(predicted)
        return logits

    def _extend(self, layers, cache, x, put, count):
        """Runs content x through its layers; `put` joins its keys and values to a layer's cache."""
        split, extended = self.config.content_depth, []
        layers = self.layers_for_stages() if layers is None else layers
        for weights, cached in zip(layers[:split], cache[:split], strict=True):

            def attend(qkv, cached=cached):
                query, key, value = split_qkv(qkv)
                cached = put(cached, _as_cached(_qk_norm(key), value))
                return _attend(_qk_norm(query), cached, count), cached

            x, cached = self.run_layer(weights, x, attend)
            extended.append(cached)
        content = self._content(x)
        for weights, cached in zip(layers[split:], cache[split:], strict=True):
            new = _as_cached(*self._content_keys_values(weights, content))
            extended.append(put(cached, new))
        return extended

    def _content(self, x):
        """What query layers see of the output of the content layers."""
        return layer_norm(self.head["memory_norm"], x).astype(self.dtype)

    def _content_keys_values(self, weights, content):
        """Keys and values of content for one query layer."""
        keys_values = project(weights["content"], content, grad_dtype=self.grad_dtype)
        key, value = split_qkv(keys_values)
        return _qk_norm(key), value

    def _query_layer(self, weights, x, attend, scale=None):
        weights = {**weights, "qkv": weights["query"]}
        return self.run_layer(weights, x, lambda query: (attend(_qk_norm(query)), None), scale)[0]

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


def pad_cache(cached: Float[Array, "B N H S"], more: int) -> Float[Array, "B N H S2"]:
    """Makes room for more positions behind those of a cache."""
    return jnp.pad(cached, ((0, 0), (0, 0), (0, 0), (0, more)))


def _split_queries(weights):
    """The weights of a query layer, with those of queries apart from those of keys and values."""
    qkv = weights["qkv"]
    others = {name: part for name, part in weights.items() if name != "qkv"}
    query = {"kernel": qkv["kernel"][:, 0], "bias": qkv["bias"][0]}
    content = {"kernel": qkv["kernel"][:, 1:], "bias": qkv["bias"][1:]}
    return {**others, "query": query, "content": content}


def _as_cached(key, value):
    # A TPU's compiler would keep caches as the new keys and values come, positions first, and turn
    # whole caches in every stage. For a CPU, XLA makes wrong programs of such a constraint.
    ordered = partial(with_layout_constraint, layouts=Layout((0, 1, 2, 3)))
    place = partial(jax.lax.platform_dependent, tpu=ordered, default=lambda x: x)
    return KeysValues(*(place(x.transpose(0, 2, 3, 1)) for x in (key, value)))  # B N H n


def _attend(query, cached, count):
    """What `attention.dense` gives if queries see the first positions of a cache."""
    _, n, N, H = query.shape
    S = cached.key.shape[-1]
    seen = jnp.arange(S) < count
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def attend(query, key, value):
        logits = product("BnNH,BNHS->BNnS", query, key) * H**-0.5
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1).astype(value.dtype)
        return product("BNnS,BNHS->BnNH", weights, value).astype(value.dtype)

    return map_images(attend, query, *cached, numbers_each=N * n * S, numbers=LOGITS)


def _qk_norm(x):
    """Scales the vector of each head to a root mean square of 1, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype)
