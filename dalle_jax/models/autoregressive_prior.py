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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from dalle_jax.models.attention import blocked, dense
from dalle_jax.models.kv_cache import Cache, attend, init_cache, layout
from dalle_jax.models.layers import init_norm, layer, layer_norm, split_qkv
from dalle_jax.models.prior_config import PriorConfig, check_lengths
from dalle_jax.models.transformer import PriorTransformer, init_embeddings, init_prior, init_stack


class AutoregressivePrior(PriorTransformer):
    """p(text, codes) in raster order, or in any order of the cells.

    Where the paper is silent, these choices are ours. From Child et al. 2019, which it names as its
    model: GELU as x * sigmoid(1.702 x), a final layer norm, biases, weights from
    N(0, 0.125 / sqrt(d_in)), those that write to the residual stream divided by sqrt(2 L),
    embeddings from N(0, 0.125 / sqrt(D)), output heads zero. Our own: one head for text and one for
    codes, so that no position spends work or probability on tokens it cannot have; no tied
    weights; no dropout. Image position p gets the row and column embedding of cell p, so the start
    of the image sits at (0, 0); a slot embedding is added to real tokens only, since each slot has
    a pad vector of its own.

    With the order "annealed" inputs have a second row and column embedding, that of the cell of
    their own code, so that the cells can come in any order (Yu et al. 2024, arXiv 2411.00776).
    """

    config: PriorConfig

    def setup(self):
        """Declares the parameters: weight matrices are named kernel, their biases bias."""
        self.embed = self.param("embed", _init_embed, self.config)
        self.layers = self.param("layers", init_stack, self.config)
        self.head = self.param("head", _init_head, self.config)

    def __call__(
        self,
        text: Int[Array, "B slots"],
        codes: Int[Array, "B I"],
        *,
        cells: Int[Array, "B I"] | None = None,
        scales: Float[Array, "L 2"] | None = None,
    ) -> tuple[Float[Array, "B slots V"], Float[Array, "B I K"]]:
        """Logits of every caption slot and of every code, given all before it.

        Args:
          text: P - 1 caption slots; ids in [0, V), or V + j for slot j without a token.
          codes: G * G codes in [0, K), in the order of the cells; the last one is only predicted.
          cells: raster position of each code, for the order "annealed"; None for raster order.
          scales: for float16: gradient scales of the attention and of the MLP branch of each layer,
            see `precision.grad_scale`. The gradients of a branch's parameters come out multiplied.

        Returns:
          Unnormalised log-probabilities in float32 of the slots' tokens and of the codes.

        Raises:
          ValueError: if text or codes do not have the lengths of the config, or cells are given to
            a prior that knows raster order alone.

        Source: Ramesh et al. 2021, sections 2.2 and 2.3, appendix B.
        """
        config = self.config
        check_lengths(config, text, codes)
        if cells is not None and config.order == "raster":
            raise ValueError(
                "got an order of the cells, but a prior with order raster predicts them row by "
                "row; leave cells out, or choose order annealed"
            )
        image = self._embed_image(codes, cells)
        x = jnp.concatenate([self.embed_text(text), image], axis=1)  # B T D
        sizes = {"text_length": config.text_length, "grid": config.grid, "kernel": config.kernel}

        def body(x, layer, is_last, kinds):
            weights, scale = layer

            def attend(qkv):
                usual, last = (
                    partial(blocked, *split_qkv(qkv), kind=kind, **sizes) for kind in kinds
                )
                return usual() if kinds[0] == kinds[1] else jax.lax.cond(is_last, last, usual), None

            return self.run_layer(weights, self.constrain(x), attend, scale)[0]

        x = self.run_layers(body, self.constrain(x), (self.layers, scales), config.kinds)
        P = config.text_length
        return self.logits(x[:, : P - 1], "text"), self.logits(x[:, P:])

    def prefill(self, text: Int[Array, "U slots"], *, samples: int = 1) -> tuple[Cache, ...]:
        """Fills the caches with captions, in one pass.

        Args:
          text: as for the forward pass, one row for each prompt.
          samples: images W that will be sampled for each prompt.

        Returns:
          One cache a layer, holding the P text positions of each prompt and room for the image.

        Raises:
          ValueError: if text does not have the length of the config.

        Source: ours; text positions see no image, so that their keys and values never change.
        """
        config = self.config
        check_lengths(self.config, text)
        sizes = {"grid": config.grid, "kernel": config.kernel, "samples": samples}
        mask = np.tri(config.text_length, dtype=bool)  # every kind is causal within the text
        x = self.embed_text(text)  # U P D
        caches = []
        for weights, kind in zip(self.unstacked(), config.kinds, strict=True):

            def fill(qkv, kind=kind):
                query, key, value = split_qkv(qkv)
                cache = init_cache(key, value, kind=kind, **sizes)
                return dense(query, key, value, mask=mask), cache

            x, cache = layer(weights, x, fill, dtype=self.dtype)
            caches.append(cache)
        return tuple(caches)

    def decode_step(self) -> Callable:
        """Builds the step that samples an image: logits of the next code, for one position.

        Each image is a column, not a row, since on a CPU the product of kernels and 8 to 32 columns
        is up to twice as fast as that of rows and kernels. Layers are unstacked and their kernels
        transposed here, once: a loop around the step then holds them as constants, where to
        unstack at every position would copy all weights each time.

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
        transpose = partial(_transposed, dtype=self.dtype)
        layers = [
            {name: transpose(part) for name, part in weights.items()}
            for weights in self.unstacked()
        ]
        head = self.head["image"]["kernel"].T
        plans = [layout(kind, grid=config.grid, kernel=config.kernel) for kind in config.kinds]
        start = self.embed["start_of_image"][None]

        def step(caches, previous, position):
            token = self._add_own_cell(self.embed["code"][previous], position[None] - 1)
            token = jnp.where(position == 0, start, token)
            x = (token + self.embed_cells(position)[None]).T  # D B
            grown = []
            for weights, plan, cache in zip(layers, plans, caches, strict=True):

                def attend_cache(qkv, plan=plan, cache=cache):
                    return attend(cache, plan, *jnp.split(qkv, 3), position=position)

                options = {"dtype": self.dtype, "linear": _column_linear, "axis": 0}
                x, cache = layer(weights, x, attend_cache, **options)
                grown.append(cache)
            x = layer_norm(self.head["norm"], x, axis=0)
            # Without a barrier XLA multiplies rows and kernel: for 8 images 10 times as slow.
            return jax.lax.optimization_barrier(head @ x).T, tuple(grown)

        return step

    def _embed_image(self, codes, cells):
        if cells is None:
            cells = jnp.arange(self.config.image_length)[None]
        tokens = self._add_own_cell(self.gather(self.embed["code"], codes[:, :-1]), cells[:, :-1])
        return self.start_with("start_of_image", tokens) + self.embed_cells(cells)  # B I D

    def _add_own_cell(self, tokens, cells):
        return tokens if self.config.order == "raster" else tokens + self.embed_cells(cells, "own_")


def init_params(config: PriorConfig, key: Key[Array, ""]) -> PyTree:
    """Initialises the parameters, as `AutoregressivePrior` says."""
    return init_prior(AutoregressivePrior(config), key)


def _init_embed(key, config):
    own = ("own_row", "own_column") if config.order == "annealed" else ()
    tables, vectors = dict.fromkeys(own, config.grid), ("start_of_text", "start_of_image")
    return init_embeddings(key, config, tables=tables, vectors=vectors)


def _init_head(key, config):
    del key  # zero heads: every token is equally likely at first
    D = config.width
    sizes = {"text": config.text_vocabulary, "image": config.codes}
    heads = {name: {"kernel": jnp.zeros((D, size))} for name, size in sizes.items()}
    return {"norm": init_norm((D,))} | heads


def _transposed(weights, dtype):
    """Weights for `_column_linear`; those of a norm stay as they are."""
    if "kernel" not in weights:
        return weights
    kernel, bias = weights["kernel"].astype(dtype), weights["bias"].astype(dtype)
    return {"kernel": kernel.reshape(-1, bias.size).T, "bias": bias.reshape(-1, 1)}


def _column_linear(weights, x):
    # A TPU sums the products of one column, which it does not multiply as a matrix, in the type
    # that comes out: 4,000 numbers in bfloat16, unless told otherwise.
    y = jnp.matmul(weights["kernel"], x, preferred_element_type=jnp.float32)
    return (y + weights["bias"]).astype(x.dtype)
