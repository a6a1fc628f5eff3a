"""Draws image codes from coarse to fine: a group of cells in each pass, and second thoughts.

Letters: U prompts, W samples of each, B = U * W batch, P text positions, I = G * G cells, G grid
side, K codebook. The code K stands for a cell that is not filled.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dalle_jax.errors import UserError
from dalle_jax.generate.drawing import check_options, drawn, empty_captions
from dalle_jax.models.prior_parts import PriorConfig
from dalle_jax.models.transformer import Prior

Schedule = Literal["linear", "cosine"]

DOUBT = np.log(4)  # a cell is drawn again if another code is this many nats likelier


class Stages(NamedTuple):
    """Every pass over B pictures, one after the other."""

    cells: Int[Array, "stages B G G"]
    """Codes after each pass, K where none is yet."""
    revised: Bool[Array, "stages B G G"]
    """Which cells the pass changed that an earlier one had filled."""


def filled(cells: int, stages: int, schedule: Schedule) -> Int[np.ndarray, " stages"]:
    """Counts the cells that are filled after each stage; every stage fills one at least.

    Args:
      cells: to be filled in all.
      stages: passes, 1 to cells.
      schedule: "linear" fills the same number each time, "cosine" few at first: the share left
        after stage k of n is cos(pi k / (2 n)).
    Raises:
      ValueError: if there are more stages than cells, or none.
    Source: linear: Fei et al. 2022 as far as the first author's prototype shows it; cosine: Chang
      et al. 2022 (MaskGIT), whose counts these are.
    """
    if not 1 <= stages <= cells:
        raise UserError(f"stages is {stages}, but must lie in 1..{cells}, the cells to be filled")
    share = np.arange(1, stages + 1) / stages
    if schedule == "linear":
        return np.floor(cells * share + 0.5).astype(int)
    # in float32, as MaskGIT: two thirds of 256 cells are 127 there, 128 in float64
    left = np.floor(cells * np.cos(np.float32(np.pi / 2) * share.astype(np.float32))).astype(int)
    # at least one a stage, and one for each stage that is still to come
    before = cells
    for k in range(stages):
        left[k] = before = min(max(left[k], stages - 1 - k), before - 1)
    return cells - left


def sample(
    config: PriorConfig,
    params: dict,
    text: Int[Array | np.ndarray, "U slots"],
    keys: Key[Array, " B"],
    *,
    stages: int = 16,
    schedule: Schedule = "cosine",
    temperature: float | int = 1.0,
    choice_temperature: float | int = 4.5,
    top_k: int | None = None,
    top_p: float | int | None = None,
    guidance: float | int = 1.0,
    revise: float | int = 0.1,
    extra: int = 0,
    given: Int[Array | np.ndarray, "B G G"] | None = None,
) -> Stages:
    """Draws grids of codes, the same number for each caption, in `stages + extra` passes.

    Each pass predicts all cells from those that are filled. Of the empty ones it fills as many as
    the schedule says: those with the greatest log of the chance to be filled now, plus log of the
    chance of the code that was drawn there, plus Gumbel noise that fades. Of the filled ones it
    changes those whose code has become the most doubtful, up to a share of them.

    A picture depends on its own key and not on the batch, up to float32 rounding.

    Args:
      config: sizes of the prior, of the progressive style.
      params: its weights.
      text: P - 1 caption slots; ids in [0, V), or V + j for slot j without a token.
      keys: one typed key a picture: all those of the first caption, then all of the next one.
      stages: passes that fill cells, 1 to the number of cells that are not given.
      schedule: how many cells each of them fills, see `filled`.
      temperature: divides the codes' logits, at least 0; 0 takes the likeliest code each time.
      choice_temperature: weight of the noise in choosing cells in the first stage, at least 0; it
        falls along a line to 0 in the last.
      top_k: draw among the k likeliest codes, in [1, K]. None: among all.
      top_p: then among the fewest that hold this share of the probability, in (0, 1]. None: all.
      guidance: s in u + s_k (c - u), where s_k rises along a line from near 1 to s in the last
        stage; 1 is off.
      revise: greatest share of the filled cells that a stage may change, in [0, 1]; it falls along
        a line to 0 in the last stage.
      extra: passes after the last stage that only revise, each up to the share `revise`.
      given: codes in [0, K) of cells that are given and never change, K in the others. As many
        cells have to be given in each picture. None: no cell.

    Returns:
      The grids after each pass; the last ones hold no K.

    Raises:
      ValueError: for a value outside its range, or sizes that do not fit each other.

    Source: Fei et al. 2022 in our reading (docs/progressive.md); the choice of cells follows Chang
      et al. 2022, rising guidance Chang et al. 2023.
    """
    check_options(config, text, keys, temperature, top_k, top_p, guidance)
    B, G, K = keys.shape[0], config.grid, config.codes
    if not 0 <= revise <= 1:
        raise UserError(f"revise is {revise}, but must lie in [0, 1]: a share of the cells")
    if choice_temperature < 0 or extra < 0:
        raise UserError(
            f"choice_temperature is {choice_temperature} and extra {extra}; neither may be negative"
        )
    start = np.full((B, G, G), K) if given is None else np.asarray(given)
    empty = np.unique((start == K).reshape(len(start), -1).sum(axis=1))
    if start.shape != (B, G, G) or not 0 <= start.min() <= start.max() <= K or len(empty) != 1:
        raise ValueError(
            f"given has shape {list(start.shape)}; give {[B, G, G]} codes in 0..{K}, with {K} in "
            "the cells to be drawn, as many in each picture"
        )
    cells = int(empty[0])
    after = filled(cells, stages, schedule)
    before = np.concatenate([[0], after[:-1]])
    k = np.arange(1, stages + 1)
    plan = {
        "number": np.arange(stages + extra),
        "fill": np.pad(after - before, (0, extra)),
        "change": np.concatenate(
            [np.floor(revise * (1 - k / stages) * before), np.full(extra, np.floor(revise * cells))]
        ).astype(int),
        "guidance": np.pad(1 + (guidance - 1) * k / stages, (0, extra), mode="edge"),
        "noise": np.pad(choice_temperature * (1 - k / stages), (0, extra)),
    }
    return _sample(
        config,
        params,
        jnp.asarray(text),
        keys,
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None), plan),
        temperature=jnp.float32(temperature),
        top_k=None if top_k is None else jnp.int32(top_k),
        top_p=None if top_p is None else jnp.float32(top_p),
        guided=guidance != 1,
        start=jnp.asarray(start.reshape(B, -1), jnp.int32),
    )


@partial(jax.jit, static_argnames=("config", "guided"))
def _sample(config, params, text, keys, plan, *, temperature, top_k, top_p, guided, start):
    B, K = len(start), config.codes
    is_given = start < K
    if guided:
        text = jnp.concatenate([text, empty_captions(config, text)])
    prior = Prior(config).bind({"params": params})
    texts = prior.read(text)

    def stage(cells, plan):
        logits, fill = prior.predict_from(texts, jnp.tile(cells, (2, 1)) if guided else cells)
        if guided:
            logits, fill = (_guided(x, plan["guidance"]) for x in (logits, fill))
        key = jax.vmap(jax.random.fold_in, (0, None))(keys, plan["number"])
        key_codes, key_choice = jnp.unstack(jax.vmap(jax.random.split)(key), axis=1)

        codes, log_q = drawn(logits, key_codes, temperature, top_k, top_p)  # B I
        noise = jax.vmap(lambda key: jax.random.gumbel(key, start.shape[1:]))(key_choice)
        ready = jax.nn.log_sigmoid(fill) + log_q + plan["noise"] * noise
        is_empty = cells == K
        fills = _greatest(jnp.where(is_empty, ready, -jnp.inf), plan["fill"])

        likeliest, doubt = doubts(logits, cells)
        doubt = jnp.where(is_empty | is_given | (doubt < DOUBT), -jnp.inf, doubt)
        changes = _greatest(doubt, plan["change"])

        cells = jnp.where(fills, codes, jnp.where(changes, likeliest, cells))
        return cells, Stages(cells, changes)

    _, found = jax.lax.scan(stage, start, plan)
    G = config.grid
    return jax.tree.map(lambda x: x.reshape(-1, B, G, G), found)


def doubts(
    logits: Float[Array, "B I K"], cells: Int[Array, "B I"]
) -> tuple[Int[Array, "B I"], Float[Array, "B I"]]:
    """The likeliest code of each cell, and by how many nats it is likelier than the one there."""
    held = jnp.minimum(cells, logits.shape[-1] - 1)[..., None]  # of an empty cell any code will do
    doubt = logits.max(axis=-1) - jnp.take_along_axis(logits, held, axis=-1)[..., 0]
    return logits.argmax(axis=-1).astype(cells.dtype), doubt


def _guided(x, guidance):
    with_caption, without = jnp.split(x, 2)
    return without + guidance * (with_caption - without)


def _greatest(x, count):
    """Marks the `count` greatest of each row that are not -inf; of equals the first."""
    order = jnp.argsort(-x, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return (rank < count) & (x > -jnp.inf)
