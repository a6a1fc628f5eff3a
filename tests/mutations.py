"""The list of tests/mutants.py: changes that make the program wrong, and who should notice."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A change that makes the program wrong, and the tests that should notice it."""

    name: str
    file: str
    """Below dalle_jax/."""
    old: str
    new: str
    tests: str
    """Arguments of pytest, with paths below tests/; may end in -k and one expression."""


OPTIMIZER = "train/test_settings_reach_optimizer.py -k "
RUN = "train/test_settings_reach_run.py -k "
EXPERIMENT = "train/test_settings_reach_experiment.py"
LOOP = "train/test_settings_reach_loop.py -k "
BATCHES = "data/test_batches.py"
DISTANCES = "evaluate/test_distances.py"
PIXELS = "image/test_pixels.py"
GOLDEN = "generate/test_golden.py::test_a_shipped_prior_samples_its_golden_codes"
POWERSGD = "parallel/test_powersgd.py"

MUTANTS = [
    # Settings that do not reach what they are for
    Mutant(
        "prior-beta2", "train/prior_stage.py", "b2=0.96", "b2=0.999", OPTIMIZER + "write_out-prior"
    ),
    Mutant(
        "prior-decay",
        "train/prior_stage.py",
        "weight_decay=run.weight_decay",
        "weight_decay=0.0",
        OPTIMIZER + "write_out-prior",
    ),
    Mutant(
        "prior-clip-norm",
        "train/prior_stage.py",
        "grad_clip_norm=run.grad_clip_norm",
        "grad_clip_norm=None",
        OPTIMIZER + "write_out-prior",
    ),
    Mutant(
        "prior-second-moment",
        "train/prior_stage.py",
        "max_second_moment=run.max_second_moment",
        "max_second_moment=None",
        OPTIMIZER + "write_out-prior",
    ),
    Mutant(
        "prior-plateau",
        "train/prior_stage.py",
        "plateau_steps=run.plateau_steps",
        "plateau_steps=None",
        OPTIMIZER + "write_out-prior",
    ),
    Mutant(
        "prior-warm-up",
        "train/prior_stage.py",
        "warm_up(run.learning_rate, run.warmup_steps, after)",
        "warm_up(run.learning_rate, 0, after)",
        OPTIMIZER + "write_out-prior",
    ),
    Mutant(
        "prior-end",
        "train/prior_stage.py",
        "cosine(run.learning_rate, run.learning_rate_end,",
        "cosine(run.learning_rate, 0.0,",
        OPTIMIZER + "write_out",
    ),
    Mutant("dvae-beta2", "train/dvae_stage.py", "b2=0.999", "b2=0.5", OPTIMIZER + "write_out-dvae"),
    Mutant(
        "vqgan-beta2", "train/vqgan_stage.py", "b2=0.999", "b2=0.5", OPTIMIZER + "write_out-vqgan"
    ),
    Mutant("clip-beta2", "train/clip_stage.py", "b2=0.98", "b2=0.5", OPTIMIZER + "write_out-clip"),
    Mutant(
        "clip-epsilon", "train/clip_stage.py", "eps=1e-6", "eps=1e-8", OPTIMIZER + "write_out-clip"
    ),
    Mutant("beta1", "optim/optimizer.py", "b1: float = 0.9", "b1: float = 0.5", OPTIMIZER + "dvae"),
    Mutant(
        "dvae-temperature",
        "train/dvae_stage.py",
        "self.temperature(step)",
        "run.temperature_start",
        RUN + "temperature",
    ),
    Mutant(
        "dvae-kl-schedule",
        "train/dvae_stage.py",
        "self.kl_weight(step)",
        "run.kl_weight",
        RUN + "kl_",
    ),
    Mutant(
        "dvae-rare-codes",
        "train/dvae_stage.py",
        "loss += run.rare_code_weight * per_value",
        "loss += 10.0 * per_value",
        RUN + "rare_code",
    ),
    Mutant(
        "vqgan-commitment",
        "train/vqgan_stage.py",
        "commitment=run.commitment",
        "commitment=0.25",
        RUN + "commitment",
    ),
    Mutant(
        "vqgan-adversarial-start",
        "train/vqgan_stage.py",
        "step < run.adversarial_start",
        "step < 0",
        RUN + "adversarial_start",
    ),
    Mutant(
        "prior-remat", "train/prior_stage.py", "remat=run.remat", "remat=False", RUN + "prior-remat"
    ),
    Mutant("clip-shift", "train/clip_stage.py", "if run.shift:", "if False:", RUN + "clip-shift"),
    Mutant(
        "progressive-order-ignored",
        "train/progressive_stage.py",
        "self.run.order, key_order",
        '"random", key_order',
        RUN + "progressive-order",
    ),
    Mutant(
        "weak-types-compile-twice",
        "models/convolution.py",
        'path[-1] == "scale", jnp.float32)',
        'float(path[-1] == "scale"))',
        RUN + "weak_types",
    ),
    Mutant(
        "ema-every",
        "train/loop.py",
        "ema_every=config.ema_every",
        "ema_every=1",
        LOOP + "ema_every",
    ),
    Mutant(
        "ema-decay",
        "train/loop.py",
        "ema_decay=config.ema_decay",
        "ema_decay=0.999",
        LOOP + "ema_decay",
    ),
    Mutant(
        "loop-accumulation",
        "train/loop.py",
        "accumulation_steps=config.accumulation_steps",
        "accumulation_steps=1",
        LOOP + "accumulation_steps",
    ),
    Mutant(
        "loop-seed",
        "train/loop.py",
        "jax.random.key(config.seed)",
        "jax.random.key(0)",
        LOOP + "seed",
    ),
    Mutant(
        "loop-keep",
        "train/loop.py",
        'workdir / "checkpoints", config.max_to_keep',
        'workdir / "checkpoints", 3',
        LOOP + "max_to_keep",
    ),
    # What an experiment asks for and exports
    Mutant(
        "prior-mirrored",
        "train/trainers.py",
        'crop="prior",\n        bpe_dropout',
        'crop="dvae",\n        bpe_dropout',
        EXPERIMENT,
    ),
    Mutant(
        "clip-mirrored",
        "train/trainers.py",
        'crop="prior",  # not mirrored',
        'crop="dvae",  # not mirrored',
        EXPERIMENT,
    ),
    Mutant(
        "no-bpe-dropout",
        "train/trainers.py",
        "bpe_dropout=run.bpe_dropout",
        "bpe_dropout=0.0",
        EXPERIMENT,
    ),
    Mutant(
        "no-caption-dropout",
        "train/trainers.py",
        "caption_dropout=run.caption_dropout",
        "caption_dropout=0.0",
        EXPERIMENT,
    ),
    Mutant(
        "codec-exports-raw-weights",
        "train/trainers.py",
        "stage.network(state.ema_params)",
        "stage.network(state.params)",
        EXPERIMENT,
    ),
    Mutant(
        "prior-exports-raw-weights",
        "train/trainers.py",
        "stage.to_model(state.ema_params, card=card",
        "stage.to_model(state.params, card=card",
        EXPERIMENT,
    ),
    Mutant(
        "clip-exports-raw-weights",
        "train/trainers.py",
        "params=jax.device_get(gather_to_host(state.ema_params)),\n        tokenizer",
        "params=jax.device_get(gather_to_host(state.params)),\n        tokenizer",
        EXPERIMENT,
    ),
    Mutant(
        "export-not-rounded",
        "generate/model_folder.py",
        "np.float32 if exact else ml_dtypes.bfloat16",
        "np.float32",
        EXPERIMENT,
    ),
    # Optimizer and schedules
    Mutant(
        "biases-decay",
        "optim/optimizer.py",
        '"kernel", params)',
        '"norm", params)',
        "optim/test_optimizer.py",
    ),
    Mutant(
        "second-moment-bound",
        "optim/optimizer.py",
        "jnp.minimum(v, max_second_moment)",
        "jnp.maximum(v, max_second_moment)",
        "optim/test_optimizer.py",
    ),
    Mutant(
        "clipped-after-the-moments",
        "optim/optimizer.py",
        "parts.insert(0, optax.clip_by_global_norm",
        "parts.insert(1, optax.clip_by_global_norm",
        "optim/test_optimizer.py",
    ),
    Mutant(
        "plateau-patience",
        "optim/optimizer.py",
        "patience=4",
        "patience=3",
        OPTIMIZER + "progressive",
    ),
    Mutant(
        "cosine-is-a-line",
        "optim/schedules.py",
        "optax.cosine_decay_schedule(1.0, steps)",
        "optax.linear_schedule(1.0, 0.0, steps)",
        "optim/test_schedules.py",
    ),
    Mutant(
        "ema-of-the-old-params",
        "train/train_step.py",
        "decay * e + (1 - decay) * p",
        "decay * p + (1 - decay) * e",
        "train/test_train_step.py",
    ),
    Mutant(
        "accumulated-sum",
        "train/train_step.py",
        "lambda x: x / k, total",
        "lambda x: x, total",
        "train/test_train_step.py",
    ),
    Mutant(
        "one-key-for-all-micro-batches",
        "train/train_step.py",
        "jax.random.fold_in(key, index), step, **scales",
        "key, step, **scales",
        "train/test_train_step.py",
    ),
    # Losses
    Mutant(
        "text-weight",
        "losses.py",
        "text_nats / 8 + image_nats * 7 / 8",
        "text_nats / 2 + image_nats / 2",
        "test_losses.py",
    ),
    Mutant(
        "pads-count", "losses.py", "is_token = text < V", "is_token = text <= V", "test_losses.py"
    ),
    Mutant(
        "laplace-jacobian",
        "losses.py",
        "+ jnp.log(x * (1 - x)) +",
        "- jnp.log(x * (1 - x)) +",
        "test_losses.py",
    ),
    Mutant(
        "gumbel-without-noise",
        "losses.py",
        "(logits + jax.random.gumbel(key, logits.shape))",
        "(logits + 0 * jax.random.gumbel(key, logits.shape))",
        "test_losses.py",
    ),
    Mutant(
        "kl-sign",
        "losses.py",
        "jnp.sum(jnp.exp(log_q) * log_q",
        "-jnp.sum(jnp.exp(log_q) * log_q",
        "test_losses.py",
    ),
    Mutant(
        "commitment-on-the-codes",
        "losses.py",
        "to_codes + commitment *",
        "commitment * to_codes +",
        "train/test_vqgan_stage.py -k pulled",
    ),
    Mutant(
        "equal-captions-are-wrong",
        "losses.py",
        "same = (tokens[:, None] == tokens[None]).all(axis=-1)",
        "same = jnp.eye(len(tokens), dtype=bool)",
        "test_losses.py",
    ),
    Mutant(
        "query-sees-its-own-stage",
        "models/progressive_prior.py",
        "stage[:, :, None] > stages[:, None, :]",
        "stage[:, :, None] >= stages[:, None, :]",
        "models/test_progressive_prior.py",
    ),
    Mutant(
        "content-sees-later-stages",
        "models/progressive_prior.py",
        "sees = stages[:, :, None] >= stages[:, None, :]",
        "sees = stages[:, :, None] > stages[:, None, :] - 2",
        "models/test_progressive_prior.py",
    ),
    Mutant(
        "query-places-exchanged",
        "models/progressive_prior.py",
        'self.embed_cells(cells, "query_")',
        'self.embed_cells(cells % self.config.grid, "query_")',
        "models/test_progressive_prior.py",
    ),
    Mutant(
        "no-qk-norm",
        "models/progressive_prior.py",
        "return y.astype(x.dtype)",
        "return x",
        "models/test_progressive_prior.py",
    ),
    Mutant(
        "cache-counts-one-cell-more",
        "models/progressive_prior.py",
        "mask = jnp.arange(S)[None, None] < at + count",
        "mask = jnp.arange(S)[None, None] <= at + count",
        "models/test_progressive_prior.py",
    ),
    Mutant(
        "guidance-does-not-rise",
        "generate/progressive_sampler.py",
        "1 + (guidance - 1) * share",
        "guidance",
        "generate/test_progressive_sampler.py -k guidance",
    ),
    Mutant(
        "revision-replaces-everything",
        "generate/progressive_sampler.py",
        "(margin >= REVISION_MARGIN)",
        "(margin >= 0)",
        "generate/test_progressive_sampler.py -k revision",
    ),
    Mutant(
        "revision-sees-the-code-it-judges",
        "models/progressive_prior.py",
        "np.flatnonzero(quarter != q)",
        "np.flatnonzero(quarter >= 0)",
        "models/test_progressive_prior.py -k left_out",
    ),
    # Networks
    Mutant(
        "rows-and-columns-exchanged",
        "models/transformer.py",
        "row[cells // G] + column[cells % G]",
        "column[cells // G] + row[cells % G]",
        GOLDEN + "[people-prior]",
    ),
    Mutant(
        "pads-look-like-tokens",
        "models/transformer.py",
        "(text < V)[..., None], token",
        "(text <= V)[..., None], token",
        "models/test_autoregressive_prior.py -k pad",
    ),
    Mutant(
        "initial-residual-branches",
        "models/transformer.py",
        "residual = (2 * L) ** -0.5",
        "residual = L**-0.5",
        "models/test_autoregressive_prior.py -k initial",
    ),
    Mutant(
        "row-mask",
        "models/masks.py",
        '"row": distance <= grid',
        '"row": distance < grid',
        "models/test_masks.py",
    ),
    Mutant(
        "column-mask",
        "models/masks.py",
        "distance % grid == 0",
        "distance % grid <= 1",
        "models/test_masks.py",
    ),
    Mutant(
        "conv-mask",
        "models/masks.py",
        "for r in range(half + 1) for c in range(-half, half + 1)",
        "for r in range(half + 1) for c in range(-half, half)",
        "models/test_masks.py",
    ),
    Mutant(
        "layer-kinds",
        "models/masks.py",
        "(i - 2) % 4 == 0",
        "(i - 1) % 4 == 0",
        "models/test_masks.py",
    ),
    Mutant(
        "attention-scale",
        "models/attention.py",
        "query = query * query.shape[-1] ** -0.5",
        "query = query * query.shape[-1] ** -0.25",
        "models/test_attention.py -k blocked_equals",
    ),
    Mutant(
        "attention-window",
        "models/attention.py",
        "min(kernel // 2 + 1, G - 1)",
        "min(kernel // 2, G - 1)",
        "models/test_attention.py -k windows",
    ),
    Mutant(
        "cache-reach",
        "models/kv_cache.py",
        "position % ((query - key).max() + 1)",
        "position % (query - key).max()",
        "models/test_kv_cache.py",
    ),
    Mutant(
        "cache-scale",
        "models/kv_cache.py",
        "rows(query * H**-0.5)",
        "rows(query)",
        "models/test_autoregressive_prior.py -k dense_layers",
    ),
    Mutant(
        "dvae-gain",
        "models/dvae.py",
        "1 / (self.groups * self.blocks_per_group) ** 2",
        "1 / (self.groups * self.blocks_per_group)",
        "models/test_dvae.py -k gain",
    ),
    Mutant(
        "vqgan-takes-the-farthest",
        "models/vqgan.py",
        "2 * products).argmin(-1)",
        "2 * products).argmax(-1)",
        "models/test_vqgan.py -k nearest",
    ),
    Mutant(
        "vqgan-gradient-stops",
        "models/vqgan.py",
        "z + jax.lax.stop_gradient(entries - z)",
        "jax.lax.stop_gradient(z) + jax.lax.stop_gradient(entries - z)",
        "models/test_vqgan.py -k straight",
    ),
    Mutant(
        "clip-reads-the-start",
        "models/clip.py",
        "at_end = jnp.argmax(ids == V + 1, axis=1)",
        "at_end = jnp.argmax(ids == V, axis=1)",
        "models/test_clip.py",
    ),
    Mutant(
        "clip-colours",
        "models/clip.py",
        "(images / 255.0 - MEAN[None, None, None])",
        "(images / 255.0 + MEAN[None, None, None])",
        "models/test_clip.py",
    ),
    # Data, images, text
    Mutant("no-shuffle", "data/batches.py", ".seed(seed).shuffle()", ".seed(seed)", BATCHES),
    Mutant(
        "order-without-seed",
        "data/batches.py",
        ".seed(seed).shuffle()",
        ".seed(0).shuffle()",
        BATCHES,
    ),
    Mutant("every-process-the-same", "data/batches.py", "self._first + place", "place", BATCHES),
    Mutant(
        "same-crop-each-epoch",
        "data/batches.py",
        "[seed, epoch, index]",
        "[seed, 0, index]",
        "data/test_draws.py",
    ),
    Mutant("first-caption-alone", "data/batches.py", "int(which * len(captions))", "0", BATCHES),
    Mutant(
        "captions-never-dropped",
        "data/batches.py",
        "use_caption >= caption_dropout",
        "use_caption >= 0",
        BATCHES,
    ),
    Mutant(
        "merges-never-dropped",
        "data/batches.py",
        "dropout=bpe_dropout, seeds",
        "dropout=0.0, seeds",
        "data/test_draws.py",
    ),
    Mutant(
        "one-seed-for-all-merges",
        "data/batches.py",
        "seeds=[int(bpe_seed)]",
        "seeds=[0]",
        "data/test_draws.py",
    ),
    Mutant(
        "prior-crop-mirrors",
        "image/pixels.py",
        "np.ascontiguousarray(_shrink_and_cut(square, px, px, round(9 * px / 8), rng))",
        "np.ascontiguousarray(_shrink_and_cut(square, px, px, round(9 * px / 8), rng)[:, ::-1])",
        PIXELS,
    ),
    Mutant(
        "dvae-crop-does-not-mirror",
        "image/pixels.py",
        "rng.random() < 0.5",
        "rng.random() < 0",
        PIXELS,
    ),
    Mutant(
        "dvae-crop-range", "image/pixels.py", "round(12 * px / 8)", "round(10 * px / 8)", PIXELS
    ),
    Mutant(
        "prior-crop-range", "image/pixels.py", "max(lowest + 1, 5 * room // 8)", "room + 1", PIXELS
    ),
    Mutant(
        "pixel-map",
        "image/pixels.py",
        "(1 - 2 * PIXEL_MARGIN) * x",
        "(1 - PIXEL_MARGIN) * x",
        PIXELS,
    ),
    Mutant(
        "capitals", "text/bpe.py", "caption.lower().replace", "caption.replace", "text/test_bpe.py"
    ),
    Mutant(
        "one-pad-for-all-slots",
        "text/bpe.py",
        "self.vocabulary + np.arange(length, dtype=np.int32)",
        "self.vocabulary + 0 * np.arange(length, dtype=np.int32)",
        "text/test_bpe.py",
    ),
    # Precision and parallel training
    Mutant(
        "scale-not-undone",
        "precision/grad_scale.py",
        "_filtered(dx / scale)",
        "_filtered(dx)",
        "precision/test_grad_scale.py",
    ),
    Mutant(
        "no-window",
        "precision/grad_scale.py",
        "~finite & (state.since >= config.backoff_interval)",
        "~finite",
        "precision/test_grad_scale.py",
    ),
    Mutant(
        "scale-without-bounds",
        "precision/grad_scale.py",
        "jnp.clip(state.scale * factor, replicas * config.min_scale, replicas * config.max_scale)",
        "state.scale * factor",
        "precision/test_grad_scale.py",
    ),
    Mutant(
        "overflow-moves-the-moments",
        "train/train_step.py",
        "unless_skipped(new.opt_state, state.opt_state)",
        "new.opt_state",
        "train/test_resblock_scaling.py",
    ),
    Mutant(
        "rounds-down",
        "precision/formats.py",
        "steps = jnp.round(",
        "steps = jnp.floor(",
        "precision/test_formats.py",
    ),
    Mutant(
        "moments-stay-float32",
        "train/prior_stage.py",
        'in_16_bits=run.moments == "16-bit"',
        "in_16_bits=False",
        "train/test_prior_stage.py -k moments",
    ),
    Mutant(
        "means-are-not-rounded",
        "optim/optimizer.py",
        "encode(jnp.clip(x, -bound, bound), format)",
        "jnp.clip(x, -bound, bound)",
        "optim/test_optimizer.py -k rounded",
    ),
    Mutant(
        "errors-forgotten",
        "parallel/powersgd.py",
        "_stored(e - sent, config), unsent",
        "_stored(0 * e, config), unsent",
        POWERSGD + " -k equals_numpy",
    ),
    Mutant(
        "powersgd-seed",
        "parallel/powersgd.py",
        "jax.random.key(config.seed)",
        "jax.random.key(0)",
        LOOP + "powersgd",
    ),
    Mutant(
        "powersgd-scale-not-undone",
        "parallel/powersgd.py",
        "x / config.q_scale for",
        "x for",
        POWERSGD + " -k reduced",
    ),
    # Checkpoints
    Mutant(
        "hash-not-compared",
        "train/manifest.py",
        '_sha256(file) != entry["sha256"]',
        "False",
        "train/test_checkpoint.py -k damage",
    ),
    Mutant(
        "old-settings-have-no-defaults",
        "train/checkpoint_diff.py",
        "saved.get(key, defaults.get(key))",
        "saved.get(key)",
        "train/test_checkpoint.py -k default",
    ),
    Mutant(
        "data-begins-anew",
        "train/loop.py",
        "iterator.set_state(position)",
        "pass",
        "train/test_loop.py -k unbroken_run",
    ),
    # Drawing
    Mutant(
        "top-k",
        "generate/logits.py",
        "inside & (rank < top_k)",
        "inside & (rank <= top_k)",
        "generate/test_logits.py",
    ),
    Mutant(
        "top-p",
        "generate/logits.py",
        "jnp.cumsum(share, axis=-1) - share",
        "jnp.cumsum(share, axis=-1)",
        "generate/test_logits.py",
    ),
    Mutant(
        "guidance",
        "generate/logits.py",
        "without + scale * (with_caption - without)",
        "with_caption + scale * (with_caption - without)",
        "generate/test_autoregressive_sampler.py -k greedy_codes",
    ),
    Mutant(
        "temperature",
        "generate/logits.py",
        "logits / jnp.where(greedy, 1, temperature)",
        "logits * jnp.where(greedy, 1, temperature)",
        "generate/test_autoregressive_sampler.py -k temperature",
    ),
    Mutant(
        "same-noise-everywhere",
        "generate/autoregressive_sampler.py",
        "jax.vmap(jax.random.fold_in, (0, None))(keys, position)",
        "jax.vmap(jax.random.fold_in, (0, None))(keys, 0 * position)",
        GOLDEN + "[people-prior]",
    ),
    Mutant(
        "one-row-more-is-kept",
        "generate/autoregressive_sampler.py",
        "position < prompt_length",
        "position <= prompt_length",
        "generate/test_autoregressive_sampler.py -k kept_rows",
    ),
    Mutant(
        "captions-share-their-noise",
        "generate/code_sampler.py",
        'zlib.crc32(prompt.lower().encode("utf-8", "replace"))',
        "0",
        GOLDEN + "[people-prior]",
    ),
    Mutant(
        "worst-first",
        "generate/rerank.py",
        "np.argsort(-scores",
        "np.argsort(scores",
        "generate/test_rerank.py -k kept",
    ),
    Mutant(
        "blend",
        "generate/edit.py",
        "(1 - step / (border + 1))",
        "(step / (border + 1))",
        "generate/test_edit.py -k blend",
    ),
    Mutant(
        "mask-cells",
        "generate/edit.py",
        "any(axis=(1, 3))",
        "all(axis=(1, 3))",
        "generate/test_edit.py -k cell",
    ),
    # Evaluation
    Mutant(
        "fid-overlap",
        "evaluate/distances.py",
        "traces - 2 * overlap",
        "traces - overlap",
        DISTANCES,
    ),
    Mutant(
        "fid-covariance",
        "evaluate/distances.py",
        "self._scatter / (self.count - 1)",
        "self._scatter / self.count",
        DISTANCES,
    ),
    Mutant(
        "kid-biased",
        "evaluate/distances.py",
        "(np.trace(kernel) if same and i == j else 0)",
        "0",
        DISTANCES,
    ),
    Mutant(
        "kid-kernel",
        "evaluate/distances.py",
        "x.shape[1] + 1) ** 3",
        "x.shape[1] + 1) ** 2",
        DISTANCES,
    ),
    Mutant(
        "precision-and-recall-exchanged",
        "evaluate/distances.py",
        "return _share_among(sampled, real, neighbours), _share_among(real, sampled, neighbours)",
        "return _share_among(real, sampled, neighbours), _share_among(sampled, real, neighbours)",
        DISTANCES,
    ),
    Mutant(
        "perplexity",
        "models/codec.py",
        "-np.sum(frequency * np.log(frequency))",
        "np.sum(frequency)",
        "models/test_codec.py",
    ),
    Mutant(
        "votes-exchanged",
        "evaluate/votes.py",
        '"first" if choice == secret.sides[pair]',
        '"second" if choice == secret.sides[pair]',
        "evaluate/test_votes.py",
    ),
    Mutant(
        "nats-by-pictures",
        "evaluate/likelihood.py",
        "(text * tokens)[where].sum() / tokens[where].sum()",
        "text[where].mean()",
        "evaluate/test_report.py",
    ),
]
