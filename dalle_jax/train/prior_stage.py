"""Stage 2: the prior learns captions and the codes of their images.

Source: Ramesh et al. 2021, section 2.2 and appendix B; the short recipe is ours.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dalle_jax.errors import UserError
from dalle_jax.generate.model import Model
from dalle_jax.image.sheet import contact_sheet
from dalle_jax.losses import prior_loss, prior_mean
from dalle_jax.models.autoregressive_prior import AutoregressivePrior, init_params
from dalle_jax.models.layers import matrices
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.optim.muon import MuonOptions
from dalle_jax.optim.optimizer import adamw
from dalle_jax.optim.schedules import cosine, warm_up
from dalle_jax.parallel.mesh import constrain_batch, gather_rows
from dalle_jax.parallel.sharding_rules import MUON, PRIOR, reshard
from dalle_jax.precision.formats import has_16_bits
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.train.cell_orders import mixed_orders, random_share
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.resblock_scaling import ResblockScaling
from dalle_jax.train.stage import Stage


@dataclass(frozen=True, kw_only=True)
class PriorRun(MuonOptions):
    """One training run of the prior; the defaults are the paper's, `short_prior_run` our recipe."""

    model: PriorConfig = field(default_factory=PriorConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: LoopConfig(steps=430_000, ema_every=25, ema_decay=0.99)
    )
    batch_size: int = 1024
    """Images in an update, over all devices."""
    learning_rate: float = 4.5e-4
    """Greatest learning rate."""
    warmup_steps: int = 5_000
    """Updates over which the learning rate rises from 0."""
    plateau_steps: int | None = 5_000
    """Updates whose mean loss is compared: after four such spans without progress the learning
    rate is halved, five times at most; None for never."""
    learning_rate_end: float | None = None
    """Learning rate at the end of a cosine over the whole run; None for no cosine."""
    weight_decay: float = 4.5e-2
    """AdamW's weight decay, multiplied by the learning rate."""
    grad_clip_norm: float | None = 4.0
    """Global norm that gradients are clipped to; None for no clipping."""
    max_second_moment: float | None = 5.0
    """Value that Adam's second moment is clipped to; None for no clipping."""
    moments: Literal["float32", "16-bit"] = "float32"
    """How the moments of the layers' kernels are stored: 16-bit is the paper's, 1-6-9 for means and
    0-6-10 for variances, in half the memory."""
    kernels: Literal["float32", "float16"] = "float32"
    """How the layers' kernels and their gradients are stored while training: float16 is the
    paper's, in half the memory, and needs precision float16. The EMA and exports are float32's."""
    bpe_dropout: float = 0.1
    """Chance that a merge of the tokenizer is skipped while training."""
    caption_dropout: float = 0.0
    """Chance that an image is shown without its caption while training, for guidance."""
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of matrix products and attention; weights, residual stream and logits are float32.
    float16 has a gradient scale for each resblock, as in the paper."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients of the layers' kernels are summed over a batch and sent between
    devices. With precision bfloat16 it may be bfloat16: half as much to send, less exact."""
    scan_layers: bool = True
    """Compile a period of four layers once and loop over it: for deep models."""
    remat: bool = True
    """Compute what is inside each layer again for the backward pass, to save memory."""
    encode_once: bool = False
    """Encode every image once, centre-cropped, ahead of training; else a new crop at each use."""

    def __post_init__(self):
        if self.optimizer == "muon" and self.moments != "float32":
            raise UserError(
                f"moments is {self.moments}, but muon has no Adam moments of the layers' kernels; "
                "leave it at float32, or choose optimizer adamw"
            )
        if self.optimizer == "muon" and self.loop.mesh.tensor > 1:
            raise ValueError(
                f"muon needs whole matrices, but tensor={self.loop.mesh.tensor} cuts them; set "
                "mesh.tensor to 1 and mesh.fsdp higher, or choose optimizer adamw"
            )


def short_prior_run(**changes) -> PriorRun:
    """Our recipe for runs of thousands of updates; `changes` replace its fields.

    docs/prior.md says what it costs and reaches.
    """
    recipe = {
        "learning_rate": 2e-3,
        "learning_rate_end": 1e-4,
        "warmup_steps": 200,
        "plateau_steps": None,
        "caption_dropout": 0.1,
        "precision": "float32",  # a CPU multiplies bfloat16 more slowly
        "scan_layers": False,
        "remat": False,
        "encode_once": True,
    }
    return PriorRun(**(recipe | changes))


class PriorStage(Stage):
    """The prior as a stage of the training loop.

    Args:
      run: the settings.
      codec_model: has the codec and all else of the model folder but the prior; None where nothing
        is sampled or written.
      tokenizer: belongs to the captions in the batches; None as well.
      validation: a function giving one pass over the validation set, in batches with int32
        "text" [B, P - 1] and "codes" [B, G, G].
      captions: of the sample sheets.
      initial: parameters to begin with; None to draw them.
    """

    name = "prior"
    rules = PRIOR
    prior, draw = AutoregressivePrior, staticmethod(init_params)
    """The network, and what initialises its parameters."""

    def __init__(
        self,
        run: PriorRun,
        *,
        codec_model: Model | None,
        tokenizer: Tokenizer | None,
        validation: Callable[[], Iterable[dict[str, np.ndarray]]],
        captions: Sequence[str],
        initial: Any = None,
    ):
        if run.grad_dtype not in ("float32", run.precision):
            raise UserError(
                f"grad_dtype is {run.grad_dtype}, but with precision {run.precision} it has "
                "to be float32"
            )
        if run.kernels not in ("float32", run.precision):
            raise UserError(
                f"kernels is {run.kernels}, but with precision {run.precision} their gradients "
                "would have no scales and become 0; choose precision float16, or leave kernels at "
                "float32"
            )
        self.run = run
        self.config = run.model
        self.model = self.prior(
            self.config,
            dtype=jnp.dtype(run.precision),
            scan=run.scan_layers,
            remat=run.remat,
            grad_dtype=jnp.dtype(run.grad_dtype),
            constrain=constrain_batch,
            gather=gather_rows,
        )
        if run.precision == "float16":
            examples = run.batch_size // run.loop.accumulation_steps
            self.scaling = ResblockScaling(self.config.depth, examples=examples)
        self._codec_model, self._tokenizer = codec_model, tokenizer
        self._validation, self._captions, self._initial = validation, captions, initial
        after = None
        if run.learning_rate_end is not None:
            length = run.loop.steps - run.warmup_steps
            after = cosine(run.learning_rate, run.learning_rate_end, max(length, 1))
        self.optimizer = adamw(
            warm_up(run.learning_rate, run.warmup_steps, after),
            b2=0.96,
            weight_decay=run.weight_decay,
            grad_clip_norm=run.grad_clip_norm,
            max_second_moment=run.max_second_moment,
            plateau_steps=run.plateau_steps,
            in_16_bits=run.moments == "16-bit",
            muon=run.muon(
                run.learning_rate,
                matrices,
                gather=partial(reshard, before=self.rules, after=MUON),
                scatter=partial(reshard, before=MUON, after=self.rules),
            ),
        )
        self._measure = jax.jit(self._loss)

    def init(self, key):
        """Initialises the parameters."""

        def stored(path, x):
            return x.astype(self.run.kernels) if has_16_bits(path) else x

        return jax.tree_util.tree_map_with_path(stored, self.draw(self.config, key))

    def init_from_data(self, params):
        """Takes the parameters to begin with, if there are any."""
        return params if self._initial is None else self._initial

    def loss(self, params, batch, key, step, *, scales=None):
        """1/8 of the text's and 7/8 of the image's mean cross-entropy, in nats per token."""
        cells = self._cells(key, batch, step) if self.config.order == "annealed" else None
        return self._loss(params, batch, scales, cells)

    def evaluate(self, params) -> dict[str, float]:
        """Measures nats per token on the validation set, each image with its first caption.

        The mean of text is over tokens, that of all else over images.
        """
        totals, weights = Counter(), Counter()
        for batch in self._validation():
            text = np.asarray(batch["text"])
            loss, metrics = self._measure(params, batch)
            for name, value in ({"loss": loss} | metrics).items():
                tokens = int((text < self.config.text_vocabulary).sum())
                weight = tokens if name == "text_nats" else len(text)
                totals[name] += weight * float(value)
                weights[name] += weight
        means = {name: total / max(weights[name], 1) for name, total in totals.items()}
        if "text_nats" in means:
            means["loss"] = prior_mean(means["text_nats"], means["image_nats"])
        return means

    def sheet(self, params):
        """Samples four images for each of the run's captions."""
        images = self.to_model(params).generate(self._captions, n=4)
        return contact_sheet(images, self._captions)

    def to_model(self, params, **changes) -> Model:
        """Puts the prior together with its tokenizer and codec; `changes` as in `Model`."""
        codec_model = self._codec_model
        part = self.name  # stages have the names of the model's parts
        parts = {
            "name": codec_model.name,
            "px": codec_model.px,
            "codec": codec_model.codec,
            "codec_params": codec_model.codec_params,
            "kernels": codec_model.kernels,
            part: self.config,
            f"{part}_params": params,
            "tokenizer": self._tokenizer,
        }
        return Model(**(parts | changes))

    def _cells(self, key, batch, step):
        """Cells of each image, in the order in which they are learned."""
        shape = (len(batch["codes"]), self.config.image_length)
        return mixed_orders(key, shape, self.random_share(step))

    def random_share(self, step):
        """Share of images in a random order at a step."""
        return random_share(step / self.run.loop.steps)

    def _loss(self, params, batch, scales=None, cells=None):
        text, codes = batch["text"], batch["codes"].reshape(len(batch["codes"]), -1)
        if cells is not None:
            codes = jnp.take_along_axis(codes, cells, axis=1)
        text_logits, image_logits = self.model.apply(
            {"params": params}, text, codes, cells=cells, scales=scales
        )
        return prior_loss(text_logits, image_logits, text, codes)
