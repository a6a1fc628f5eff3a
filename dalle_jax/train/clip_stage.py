"""The contrastive stage: a CLIP learns which caption belongs to which image.

Source: Radford et al. 2021, sections 2.3 to 2.5; the short recipe is ours.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from dalle_jax.errors import UserError
from dalle_jax.generate.clip_scorer import retrieval_accuracy
from dalle_jax.losses import contrastive_loss
from dalle_jax.models.clip import CLIP, LOG_SCALE_MAX, CLIPConfig
from dalle_jax.models.layers import matrices
from dalle_jax.optim.muon import MuonOptions
from dalle_jax.optim.optimizer import adamw
from dalle_jax.optim.schedules import cosine, warm_up
from dalle_jax.parallel.mesh import constrain_batch
from dalle_jax.parallel.sharding_rules import CLIP as CLIP_RULES
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.stage import Stage


@dataclass(frozen=True, kw_only=True)
class ClipRun(MuonOptions):
    """One training run of a CLIP; the defaults are the paper's, `short_clip_run` our recipe."""

    model: CLIPConfig = field(default_factory=CLIPConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: LoopConfig(steps=390_000)
    )
    batch_size: int = 32_768
    """Images in an update, over all devices; each is compared with every caption of them."""
    micro_batch: int | None = None
    """Images whose activations are in memory at a time, over all devices; None for all. The
    loss is still that of the whole batch; every activation is computed twice."""
    learning_rate: float = 5e-4
    """Greatest learning rate."""
    learning_rate_end: float = 0.0
    """Learning rate at the end of a cosine over the whole run."""
    warmup_steps: int = 2_000
    """Updates over which the learning rate rises from 0."""
    weight_decay: float = 0.2
    """AdamW's weight decay, multiplied by the learning rate."""
    shift: int = 0
    """Pixels that a training image is moved by at most, its border repeated (ours)."""
    reconstructions: bool = False
    """Show every image a second time, as the codec reconstructs it (ours), so that scores hold for
    samples too."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of matrix products and attention; weights, residual stream and features are float32."""
    folder: str = "clip"
    """Folder of the run in the workdir. What is trained in `clip` goes into the model folder."""

    def __post_init__(self):
        if self.loop.accumulation_steps > 1:
            raise UserError(
                f"accumulation_steps is {self.loop.accumulation_steps}, but a contrastive loss "
                "compares all of a batch; leave it at 1 and give a micro_batch to save memory"
            )
        if self.loop.powersgd.rank is not None:
            raise UserError(
                f"powersgd.rank is {self.loop.powersgd.rank}, but with compressed gradients every "
                "group has a loss of its own, and a contrastive loss compares all of a batch; "
                "leave it out"
            )
        if self.micro_batch is not None and (
            self.micro_batch < 1 or self.batch_size % self.micro_batch
        ):
            raise UserError(
                f"batch_size is {self.batch_size}, but has to be a multiple of "
                f"micro_batch={self.micro_batch}"
            )


def short_clip_run(**changes) -> ClipRun:
    """Our recipe for runs of thousands of updates; `changes` replace its fields.

    docs/clip.md says what it costs and reaches.
    """
    recipe = {
        "batch_size": 128,
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "shift": 4,
        "reconstructions": True,
        "precision": "float32",  # a CPU multiplies bfloat16 more slowly
    }
    return ClipRun(**(recipe | changes))


class ClipStage(Stage):
    """A CLIP as a stage of the training loop.

    Args:
      run: the settings.
      validation: for each set to measure on, by the beginning of its metrics' names, a function
        giving one pass over it, in batches with uint8 "image" [B, R, R, 3] and int32
        "text" [B, P - 2].
    """

    name = "clip"
    rules = CLIP_RULES

    def __init__(
        self,
        run: ClipRun,
        *,
        validation: Mapping[str, Callable[[], Iterable[dict[str, np.ndarray]]]],
    ):
        self.run = run
        self.model = CLIP(run.model, dtype=jnp.dtype(run.precision), constrain=constrain_batch)
        self._validation = validation
        length = max(run.loop.steps - run.warmup_steps, 1)
        after = cosine(run.learning_rate, run.learning_rate_end, length)
        self.optimizer = optax.chain(
            adamw(
                warm_up(run.learning_rate, run.warmup_steps, after),
                b2=0.98,
                eps=1e-6,
                weight_decay=run.weight_decay,
                muon=run.muon(run.learning_rate, matrices),
            ),
            optax.stateless(_below_limit),
        )
        self._features = jax.jit(self._encode)

    def init(self, key):
        """Initialises the parameters."""
        c = self.run.model
        images, text = jnp.zeros((1, c.px, c.px, 3), jnp.uint8), jnp.zeros((1, c.slots), jnp.int32)
        return self.model.init(key, images, text)["params"]

    def loss(self, params, batch, key, step):
        """Symmetric InfoNCE over the whole batch, in nats."""
        del step
        run = self.run
        batch = {name: batch[name] for name in ("image", "text")}
        if run.shift:
            batch["image"] = _shifted(key, batch["image"], run.shift)
        if run.micro_batch is None:
            image, text = self._encode(params, batch)
        else:
            image, text = _in_parts(
                lambda part: self._encode(params, part), batch, size=run.micro_batch
            )
        scale = jnp.exp(params["log_scale"])
        loss, metrics = contrastive_loss(image, text, scale, batch["text"])
        return loss, metrics | {"scale": scale}

    def evaluate(self, params) -> dict[str, float]:
        """Measures retrieval on the validation sets; see `retrieval_accuracy`."""
        measured = {}
        for beginning, batches in self._validation.items():
            features, captions = [], []
            for batch in batches():
                batch = {name: batch[name] for name in ("image", "text")}
                features.append(jax.device_get(self._features(params, batch)))
                captions += [row.tobytes() for row in batch["text"]]
            image, text = map(np.concatenate, zip(*features, strict=True))
            accuracy = retrieval_accuracy(image, text, captions)
            measured |= {f"{beginning}{name}": value for name, value in accuracy.items()}
        return measured

    def _encode(self, params, batch):
        image, text, _ = self.model.apply({"params": params}, batch["image"], batch["text"])
        return image, text


def _below_limit(updates, params):
    """Stops the temperature where similarities are multiplied by 100."""
    return updates | {
        "log_scale": jnp.minimum(updates["log_scale"], LOG_SCALE_MAX - params["log_scale"])
    }


def _shifted(key, images, most):
    """Moves each image by up to `most` pixels each way; its outermost pixels fill the gap."""
    B, R = images.shape[:2]
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    at = jax.random.randint(key, (B, 2), 0, 2 * most + 1)

    def cut(image, at):
        return jax.lax.dynamic_slice(image, (at[0], at[1], 0), (R, R, 3))

    return jax.vmap(cut)(padded, at)


def _in_parts(encode, batch, *, size):
    """Encodes `size` examples at a time and keeps nothing of them but the features.

    The backward pass encodes each part again: the gradient is that of the whole batch, the memory
    that of a part.
    """

    def split(x):  # every k-th example, so that a batch spread over devices stays where it is
        return x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1)  # k size ...

    def join(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    features = jax.lax.map(jax.checkpoint(encode, prevent_cse=False), jax.tree.map(split, batch))
    return jax.tree.map(join, features)
