"""The prior over captions and image codes: a sparse decoder-only transformer.

Letters: B batch, T positions (P text + I image, I = G * G), S key positions, D width, N heads,
H head size, F mlp, V text vocabulary, K codebook, G grid side, L layers.

    position   0              1 .. P-1            P               P+1 .. T-1
    input      start of text  caption slot 0..    start of image  code 0 .. I-2
    predicts   slot 0         slot 1 .. P-2, -    code 0          code 1 .. I-1

The last text position predicts nothing.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree

from dalle_jax.models.attention import blocked, dense
from dalle_jax.models.kv_cache import Cache, attend, init_cache, layout
from dalle_jax.models.layers import layer, layer_norm, layer_weights
from dalle_jax.models.prior_config import (
    PriorConfig,
    check_lengths,
    init_embeddings,
    init_head,
    init_stack,
)


class Prior(nn.Module):
    """p(text, codes) in raster order.

    Where the paper is silent, these choices are ours. From Child et al. 2019, which it names as its
    model: GELU as x * sigmoid(1.702 x), a final layer norm, biases, weights from
    N(0, 0.125 / sqrt(d_in)), those that write to the residual stream divided by sqrt(2 L),
    embeddings from N(0, 0.125 / sqrt(D)), output heads zero. Our own: one head for text and one for
    codes, so that no position spends work or probability on tokens it cannot have; no tied
    weights; no dropout. Image position p gets the row and column embedding of cell p, so the start
    of the image sits at (0, 0); a slot embedding is added to real tokens only, since each slot has
    a pad vector of its own.

    All parameters of the layers are stacked on a first axis of size L, whatever the options below.
    """

    config: PriorConfig
    dtype: DTypeLike = jnp.float32
    """Of matrix products and attention; the residual stream, norms and logits are float32."""
    scan: bool = False
    """Compile a period of four layers once and loop over it: for deep models."""
    remat: bool = False
    """Keep only what enters each layer for the backward pass and compute the rest again."""
    sums: DTypeLike = jnp.float32
    """In which the gradients of kernels are summed, if dtype is of half precision."""
    constrain: Callable[[Array], Array] = lambda x: x
    """Says where the residual stream [B, T, D] lies, if it is spread over devices."""
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
        *,
        scales: Float[Array, "L 2"] | None = None,
    ) -> tuple[Float[Array, "B slots V"], Float[Array, "B I K"]]:
        """Logits of every caption slot and of every code, given all before it.

        Args:
          text: P - 1 caption slots; ids in [0, V), or V + j for slot j without a token.
          codes: G * G codes in [0, K), in raster order; the last one is only predicted.
          scales: for float16: gradient scales of the attention and of the MLP branch of each layer,
            see `precision.grad_scale`. The gradients of a branch's parameters come out multiplied.

        Returns:
          Unnormalised log-probabilities in float32 of the slots' tokens and of the codes.

        Raises:
          ValueError: if text or codes do not have the lengths of the config.

        Source: Ramesh et al. 2021, sections 2.2 and 2.3, appendix B.
        """
        config = self.config
        check_lengths(config, text, codes)
        x = jnp.concatenate([self._embed_text(text), self._embed_image(codes)], axis=1)  # B T D
        x = self._through_layers(x, scales)
        P = config.text_length
        return (
            self._logits(x[:, : P - 1], "text"),
            self._logits(x[:, P:], "image"),
        )

    def prefill(self, text: Int[Array, "U slots"], *, samples: int = 1) -> tuple[Cache, ...]:
        """Reads captions in one pass.

        Args:
          text: as for the forward pass, one row for each prompt.
          samples: images W that will be drawn for each prompt.

        Returns:
          One cache a layer, holding the P text positions of each prompt and room for the image.

        Raises:
          ValueError: if text does not have the length of the config.

        Source: ours; text positions see no image, so that they never need a second look.
        """
        config = self.config
        check_lengths(self.config, text)
        sizes = {"grid": config.grid, "kernel": config.kernel, "samples": samples}
        mask = np.tri(config.text_length, dtype=bool)  # every kind is causal within the text
        x = self._embed_text(text)  # U P D
        caches = []
        for weights, kind in zip(self._unstacked(), config.kinds, strict=True):

            def look(qkv, kind=kind):
                query, key, value = _parted(qkv)
                cache = init_cache(key, value, kind=kind, **sizes)
                return dense(query, key, value, mask=mask), cache

            x, cache = layer(weights, x, look, dtype=self.dtype)
            caches.append(cache)
        return tuple(caches)

    def decoder(self) -> Callable:
        """Gives the step that draws an image: logits of the next code, one position at a time.

        The step keeps an image in a column, not in a row, since on a CPU the product of kernels
        and 8 to 32 columns is up to twice as fast as that of rows and kernels. Layers are cut out
        of their stack here, once, with their kernels turned: a loop around the step then holds
        them as constants, where cutting at every position would copy all weights each time.

        Returns:
          A function of
            caches: what `prefill`, or this function at position - 1, returned;
            previous: code at position - 1 of each of the B images, in [0, K), the samples of a
              prompt next to each other; ignored at position 0;
            position: raster position p in [0, I) whose code is wanted;
          to float32 logits [B, K], equal to the forward pass, and the caches with this position.

        Source: ours.
        """
        config = self.config
        turn = partial(_turned, dtype=self.dtype)
        layers = [
            {name: turn(part) for name, part in weights.items()} for weights in self._unstacked()
        ]
        head = self.head["image"]["kernel"].T
        plans = [layout(kind, grid=config.grid, kernel=config.kernel) for kind in config.kinds]
        start = self.embed["start_of_image"][None]

        def step(caches, previous, position):
            token = jnp.where(position == 0, start, self.embed["code"][previous])
            x = (token + self._cell(position)[None]).T  # D B
            grown = []
            for weights, plan, cache in zip(layers, plans, caches, strict=True):

                def look(qkv, plan=plan, cache=cache):
                    return attend(cache, plan, *jnp.split(qkv, 3), position=position)

                x, cache = layer(weights, x, look, dtype=self.dtype, linear=_column_linear, axis=0)
                grown.append(cache)
            x = layer_norm(self.head["norm"], x, axis=0)
            # Without a barrier XLA multiplies rows and kernel: for 8 images 10 times as slow.
            return jax.lax.optimization_barrier(head @ x).T, tuple(grown)

        return step

    def _through_layers(self, x, scales):
        config, x = self.config, self.constrain(x)
        sizes = {"text_length": config.text_length, "grid": config.grid, "kernel": config.kernel}

        def through(x, stack, last, kinds):
            weights, scale = stack

            def look(qkv):
                usual, final = (
                    partial(blocked, *_parted(qkv), kind=kind, **sizes) for kind in kinds
                )
                return usual() if kinds[0] == kinds[1] else jax.lax.cond(last, final, usual), None

            options = {"dtype": self.dtype, "scale": scale, "sums": self.sums}
            return layer(weights, self.constrain(x), look, **options)[0]

        if self.remat:  # within a scan nothing could undo the recomputation, so it needs no guard
            through = jax.checkpoint(through, static_argnums=3, prevent_cse=not self.scan)
        period = 4 if len(set(config.kinds)) > 1 else 1
        scanned = config.depth // period * period if self.scan else 0
        stack = (self.layers, scales)  # both [L, ...]
        if scanned:

            def periods(array):  # scanning but a part of the layers would copy their weights
                return array[:scanned].reshape(-1, period, *array.shape[1:])

            def run(x, item):
                last, stack = item  # the last period ends with a kind of its own
                for i in range(period):
                    kinds = (config.kinds[i], config.kinds[scanned - period + i])
                    x = through(x, layer_weights(stack, i), last, kinds)
                return x, None

            last = jnp.arange(period, scanned + 1, period) == scanned
            x, _ = jax.lax.scan(run, x, (last, jax.tree.map(periods, stack)))
        for i in range(scanned, config.depth):
            x = through(x, layer_weights(stack, i), True, (config.kinds[i],) * 2)
        return x

    def _unstacked(self):
        return [layer_weights(self.layers, i) for i in range(self.config.depth)]

    def _embed_text(self, text):
        V = self.config.text_vocabulary
        token = self.gather(self.embed["text"], jnp.minimum(text, V - 1))
        token = token + self.embed["slot"][None]
        slots = jnp.where((text < V)[..., None], token, self.embed["pad"][None])
        return self._start("start_of_text", slots)  # B P D

    def _embed_image(self, codes):
        tokens = self._start("start_of_image", self.gather(self.embed["code"], codes[:, :-1]))
        return tokens + self._cell(jnp.arange(self.config.image_length))[None]  # B I D

    def _start(self, name, x):
        B, _, D = x.shape
        return jnp.concatenate([jnp.broadcast_to(self.embed[name], (B, 1, D)), x], axis=1)

    def _cell(self, position):
        G = self.config.grid
        return self.embed["row"][position // G] + self.embed["column"][position % G]

    def _logits(self, x, of):
        x = layer_norm(self.head["norm"], x)
        return jnp.einsum("BTD,DV->BTV", x, self.head[of]["kernel"])


def init_params(config: PriorConfig, key: Key[Array, ""]) -> PyTree:
    """Draws the first parameters, as `Prior` says, without tracing its passes."""
    return Prior(config).init(key, method=lambda prior: prior.head)["params"]


def _parted(qkv):
    return (qkv[:, :, i] for i in range(3))  # B T N H each


def _turned(weights, dtype):
    """Weights for `_column_linear`; those of a norm stay as they are."""
    if "kernel" not in weights:
        return weights
    kernel, bias = weights["kernel"].astype(dtype), weights["bias"].astype(dtype)
    return {"kernel": kernel.reshape(-1, bias.size).T, "bias": bias.reshape(-1, 1)}


def _column_linear(weights, x):
    return weights["kernel"] @ x + weights["bias"]
