"""Samples codes from the progressive prior in stages, a group of cells at a time.

Letters: U prompts, W samples of each, B = U * W batch, P text positions, I = G * G cells, G grid
side, K codebook. The code K stands for a cell that is not filled.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dalle_jax.errors import UserError
from dalle_jax.generate.logits import (
    check_inputs,
    empty_captions,
    guide,
    sample_logits,
    traced_options,
)
from dalle_jax.generate.sampling import SamplingConfig, Schedule
from dalle_jax.models.progressive_prior import ProgressiveConfig, ProgressivePrior, pad_cache

STAGES = 16  # by default, or one per cell if there are fewer
REVISION_MARGIN = np.log(4)  # nats by which another code is likelier than one that is revised
SPANS = 4  # loops that the stages are compiled as, each as wide as its largest stage


def cells_filled(cells: int, stages: int, schedule: Schedule) -> Int[np.ndarray, " stages"]:
    """Counts the cells that are filled after each stage; every stage fills at least one.

    Args:
      cells: to be filled in all.
      stages: 1 to cells.
      schedule: "linear" fills the same number each time, "cosine" few at first: the share left
        after stage k of n is cos(pi k / (2 n)).
    Raises:
      UserError: if there are more stages than cells, or none.
    Source: linear: Fei et al. 2022, by the first author's prototype; cosine: Chang et al. 2022
      (MaskGIT), with the same counts.

    >>> cells_filled(16, 4, "linear").tolist()
    [4, 8, 12, 16]
    >>> cells_filled(16, 4, "cosine").tolist()
    [2, 5, 10, 16]
    """
    if not 1 <= stages <= cells:
        raise UserError(f"stages is {stages}, but must lie in 1..{cells}, the cells to be filled")
    share = np.arange(1, stages + 1) / stages
    if schedule == "linear":
        return np.floor(cells * share + 0.5).astype(int)
    # in float32, as MaskGIT: two thirds of 256 cells are 127 there, 128 in float64
    left = np.floor(cells * np.cos(np.float32(np.pi / 2) * share.astype(np.float32))).astype(int)
    # at least one cell per stage, and one left for each later stage
    before = cells
    for k in range(stages):
        left[k] = before = min(max(left[k], stages - 1 - k), before - 1)
    return cells - left


def sample(
    config: ProgressiveConfig,
    params: dict,
    text: Int[Array | np.ndarray, "U slots"],
    keys: Key[Array, " B"],
    *,
    sampling: SamplingConfig = SamplingConfig(),
    known: Int[Array | np.ndarray, "B G G"] | None = None,
) -> Int[Array, "passes B G G"]:
    """Samples grids of codes, the same number for each caption.

    A stage chooses empty cells, queries the prior for their codes, samples them and adds them to
    the cache. A sample depends on the key of its image and not on the batch, up to float32
    rounding.

    Args:
      config: sizes of the prior.
      params: its weights.
      text: P - 1 caption slots; ids in [0, V), or V + j for slot j without a token.
      keys: one typed key per image: those of the first caption, then those of the next one.
      sampling: how to sample, with at most one stage per cell that is not known.
      known: codes in [0, K) of cells that never change, K in the others, the same number of cells
        in each image; None for no cell.

    Returns:
      The grids after each stage and each revision; the last ones hold no K.

    Raises:
      UserError: for a value outside its range, or sizes that do not fit each other.

    Source: ours, after Li et al. 2025 (ARPG), with stages as in Fei et al. 2022; confidence follows
      Chang et al. 2022, rising guidance Chang et al. 2023.
    """
    passes = sample_passes(config, params, text, keys, sampling=sampling, known=known)
    return jnp.concatenate(list(passes))


def sample_passes(
    config: ProgressiveConfig,
    params: dict,
    text: Int[Array | np.ndarray, "U slots"],
    keys: Key[Array, " B"],
    *,
    sampling: SamplingConfig = SamplingConfig(),
    known: Int[Array | np.ndarray, "B G G"] | None = None,
) -> Iterator[Int[Array, "passes B G G"]]:
    """Samples as `sample` does, and gives the grids of some stages, or of a revision, at a time."""
    check_inputs(config, text, keys, sampling)
    B, G, K = keys.shape[0], config.grid, config.codes
    start = np.full((B, G, G), K) if known is None else np.asarray(known)
    empty = np.unique((start == K).reshape(len(start), -1).sum(axis=1))
    if start.shape != (B, G, G) or not 0 <= start.min() <= start.max() <= K or len(empty) != 1:
        raise UserError(
            f"known has shape {list(start.shape)}; give {[B, G, G]} codes in 0..{K}, with {K} in "
            "the cells to sample, the same number in each image"
        )
    cells = int(empty[0])
    stages = min(STAGES, cells) if sampling.stages is None else sampling.stages
    after = cells_filled(cells, stages, sampling.schedule)
    counts, last = np.diff(after, prepend=0), stages - 1
    before = config.text_length + config.image_length - cells + after - counts  # in the cache
    options = traced_options(sampling)
    start = start.reshape(B, -1).astype(np.int32)
    layers = _unstack(config, params)
    state, captions, cache = _begin(
        *(config, params, layers, jnp.asarray(text), keys, start),
        choice_temperature=np.float32(sampling.choice_temperature),
        order=sampling.order,
        guided=options["guidance"] is not None,
        num_known=config.image_length - cells,
    )
    codes = start
    spans = np.array_split(np.arange(last), min(SPANS, last)) if last else []
    for span in [*spans, np.array([last])]:
        # of numpy: making jax arrays of them took a seventh of the time of a small image
        integers = (x.astype(np.int32) for x in (span, before[span], counts[span]))
        plan = [*integers, ((span + 1) / stages).astype(np.float32)]
        n = int(counts[span].max())
        codes, cache, grids = _sample_span(
            *(config, params, layers, state, codes, cache, plan),
            **options,
            by_confidence=sampling.order == "confidence",
            n=n,
            length=None if span[0] == last else int(before[span[-1]]) + n,
        )
        yield grids.reshape(-1, B, G, G)
    for _ in range(sampling.revise or 0):
        codes = _revise(config, params, layers, captions, codes, start, options["guidance"])
        yield codes.reshape(1, B, G, G)


@partial(jax.jit, static_argnames="config")
def _unstack(config, params):
    return _bind(config, params).layers_for_stages()


@partial(jax.jit, static_argnames=("config", "order", "guided", "num_known"))
def _begin(
    config, params, layers, text, keys, start, *, choice_temperature, order, guided, num_known
):  # fmt: skip
    """Reads the captions and the known cells, and draws the order of the cells."""
    B, P, K = len(start), config.text_length, config.codes
    I = config.image_length  # noqa: E741
    samples = B // len(text)
    prior = _bind(config, params)
    captions = prior.prefill(text, layers=layers)
    key_order, key_codes = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    noise = choice_temperature * _gumbel(key_order, I)
    if order == "dynamic":
        logits = prior.predict(captions, jnp.arange(I)[None], count=P, layers=layers)
        noise += jnp.repeat(-_entropy(logits), samples, axis=0)
    elif order == "raster":
        noise = jnp.broadcast_to(-jnp.arange(I, dtype=jnp.float32), (B, I))

    captions = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), captions)
    if guided:  # one empty caption serves all
        nothing = prior.prefill(empty_captions(config, text)[:1], layers=layers)
        captions = jax.tree.map(
            lambda x, y: jnp.concatenate([x, jnp.broadcast_to(y, x.shape)]), captions, nothing
        )
    cache = jax.tree.map(partial(pad_cache, more=num_known), captions)
    if num_known:
        _, cells = jax.lax.top_k((start < K).astype(jnp.float32), num_known)
        known, cells = (
            jnp.tile(x, (2, 1)) if guided else x
            for x in (jnp.take_along_axis(start, cells, axis=1), cells)
        )
        cache = prior.extend(cache, known, cells, at=P, count=num_known, layers=layers)
    return (noise, key_codes), captions, cache


@partial(jax.jit, static_argnames=("config", "by_confidence", "n", "length"))
def _sample_span(
    config, params, layers, state, codes, cache, plan, *, temperature, top_k, top_p, guidance,
    by_confidence, n, length,
):  # fmt: skip
    """Samples some stages of at most n cells, in a cache of this length; None for the last one."""
    noise, key_codes = state
    B, I, K = len(codes), config.image_length, config.codes  # noqa: E741
    prior = _bind(config, params)
    guided = guidance is not None  # None has no leaves, so that jit compiles it in

    def twice(x):
        return jnp.concatenate([x, x]) if guided else x

    def stage(carry, plan):
        codes, cache = carry
        number, at, count, share = plan  # cells in the cache, cells of this stage
        key = jax.vmap(jax.random.fold_in, (0, None))(key_codes, number)
        priority = noise
        if by_confidence:
            all_cells = jnp.broadcast_to(jnp.arange(I)[None], (B, I))
            logits = prior.predict(cache, twice(all_cells), count=at, layers=layers)
            logits = guide(logits, _guidance_at(guidance, share))
            sampled, log_q = sample_logits(logits, key, temperature, top_k, top_p)
            priority = log_q + (1 - share) * noise
        _, cells = jax.lax.top_k(jnp.where(codes == K, priority, -jnp.inf), n)
        if by_confidence:
            new = jnp.take_along_axis(sampled, cells, axis=1)
        else:
            logits = prior.predict(cache, twice(cells), count=at, layers=layers)
            logits = guide(logits, _guidance_at(guidance, share))
            new, _ = sample_logits(logits, key, temperature, top_k, top_p)
        if length is not None:  # the codes of the last stage are not cached
            added = {"at": at, "count": count, "layers": layers}
            cache = prior.extend(cache, twice(new), twice(cells), **added)
        wanted = jnp.where(jnp.arange(n)[None] < count, cells, I)  # the rest is out of bounds
        codes = jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(codes, wanted, new)
        return (codes, cache), codes

    if length is not None:
        more = max(length - cache[0].key.shape[-1], 0)
        cache = jax.tree.map(partial(pad_cache, more=more), cache)
    (codes, cache), grids = jax.lax.scan(stage, (codes, cache), plan)
    return codes, cache, grids


@partial(jax.jit, static_argnames="config")
def _revise(config, params, layers, captions, codes, start, guidance):
    """Replaces codes of a full grid that are much less likely than others."""
    prior = _bind(config, params)
    both = codes if guidance is None else jnp.concatenate([codes, codes])
    logits = guide(prior.predict_left_out(captions, both, layers=layers), _guidance_at(guidance, 1))
    likeliest, margin = revision_margins(logits, codes)
    unknown = start == config.codes
    return jnp.where(unknown & (margin >= REVISION_MARGIN), likeliest, codes)


def _bind(config, params):
    """The prior with its weights, whose kernels say the type of its products."""
    dtype = params["layers"]["mlp_in"]["kernel"].dtype
    return ProgressivePrior(config, dtype=dtype).bind({"params": params})


def _guidance_at(guidance, share):
    """The scale of guidance rises along a line, to the whole one when all cells are filled."""
    return None if guidance is None else 1 + (guidance - 1) * share


def revision_margins(
    logits: Float[Array, "B I K"], codes: Int[Array, "B I"]
) -> tuple[Int[Array, "B I"], Float[Array, "B I"]]:
    """The likeliest code of each cell, and how many nats likelier it is than the cell's code."""
    there = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    return logits.argmax(axis=-1).astype(codes.dtype), logits.max(axis=-1) - there


def _gumbel(keys, length):
    return jax.vmap(lambda key: jax.random.gumbel(key, (length,)))(keys)


def _entropy(logits):
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
