"""One training loop for every stage, its state, its checkpoints and its log."""

from dalle_jax.extras import require

require("train")
