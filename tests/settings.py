"""For every field of every run another value, and where the change has to show.

    update   what the optimizer makes of gradients       train/test_settings_reach_optimizer.py
    batches  what an experiment asks the data for        train/test_settings_reach_run.py
    graph    operations and constants of the loss        the same
    shapes   shapes of the parameters                    the same
    init     operations and constants that draw them     the same
    start    the parameters that training starts from    the same

A new field needs a row, or a reason in ELSEWHERE.
"""

RATES = {
    "learning_rate": (0.2, "update"),
    "learning_rate_end": (0.09, "update"),
    "warmup_steps": (0, "update"),
    "weight_decay": (0.0, "update"),
}
CODEC = {
    "px": (24, "batches"),
    "crop_px": (None, "graph"),
    "batch_size": (8, "batches"),
    "grad_clip_norm": (None, "update"),
}
PRIOR = {
    "batch_size": (8, "batches"),
    "plateau_steps": (None, "update"),
    "grad_clip_norm": (None, "update"),
    "max_second_moment": (None, "update"),
    "bpe_dropout": (0.5, "batches"),
    "caption_dropout": (0.5, "batches"),
    "precision": ("bfloat16", "graph"),
    "scan_layers": (True, "graph"),
    "remat": (True, "graph"),
    "encode_once": (False, "batches"),
    "model.width": (8, "shapes"),
    "model.depth": (1, "shapes"),
    "model.heads": (1, "shapes"),
    "model.text_vocabulary": (319, "shapes"),
    "model.text_length": (63, "shapes"),
    "model.grid": (3, "shapes"),
    "model.codes": (11, "shapes"),
    "model.kernel": (1, "graph"),
    "model.mlp_ratio": (2, "shapes"),
    "model.attention": ("dense", "graph"),
}
AUTOREGRESSIVE = ("model.kernel", "model.attention")
FIELDS = {
    "dvae": RATES
    | CODEC
    | {
        "learning_rate_steps": (9, "update"),
        "temperature_start": (0.5, "graph"),
        "temperature_end": (0.5, "graph"),
        "temperature_steps": (6, "graph"),
        "kl_weight": (3.0, "graph"),
        "kl_steps": (6, "graph"),
        "rare_code_weight": (5.0, "graph"),
        "kmeans_init": (True, "start"),
        "min_log_scale": (None, "graph"),
        "model.width": (4, "shapes"),
        "model.groups": (2, "shapes"),
        "model.blocks_per_group": (2, "shapes"),
        "model.codes": (11, "shapes"),
        "model.code_width": (4, "shapes"),
        "model.residual_gain": (0.5, "graph"),
        "model.code_std": (0.5, "init"),
    },
    "vqgan": RATES
    | CODEC
    | {
        "commitment": (0.5, "graph"),
        "unused_code_weight": (0.2, "graph"),
        "adversarial_weight": (0.4, "graph"),
        "adversarial_start": (9, "graph"),
        "discriminator_width": (8, "shapes"),
        "discriminator_layers": (2, "shapes"),
        "model.patch": (2, "shapes"),
        "model.width": (8, "shapes"),
        "model.multipliers": ((2, 2), "shapes"),
        "model.blocks_per_group": (2, "shapes"),
        "model.attention": ((2,), "shapes"),
        "model.z_width": (4, "shapes"),
        "model.codes": (11, "shapes"),
        "model.code_width": (4, "shapes"),
    },
    "prior": RATES | PRIOR,
    "progressive": RATES
    | {name: row for name, row in PRIOR.items() if name not in AUTOREGRESSIVE}
    | {
        "order": ("certain", "graph"),
        "model.depth": (2, "shapes"),
        "model.query_depth": (2, "graph"),
    },
    "clip": RATES
    | {
        "batch_size": (8, "batches"),
        "micro_batch": (2, "graph"),
        "shift": (2, "graph"),
        "precision": ("bfloat16", "graph"),
        "model.px": (12, "shapes"),
        "model.patch": (2, "shapes"),
        "model.features": (4, "shapes"),
        "model.mlp_ratio": (2, "shapes"),
        "model.text_vocabulary": (319, "shapes"),
        "model.text_length": (18, "shapes"),
    }
    | {
        f"model.{part}_{size}": (1 if size != "width" else 4, "shapes")
        for part in ("image", "text")
        for size in ("width", "depth", "heads")
    },
}
ELSEWHERE = {
    ("prior", "model.order"): "needs dense attention: tests/train/test_prior_stage.py",
    ("prior", "scan_layers"): "needs four layers of two kinds; the progressive stage shows it",
    ("clip", "reconstructions"): "says whether a codec is opened at all: tests/test_experiments.py",
    ("clip", "folder"): "says where a run is written: tests/test_experiments.py",
    **{
        (stage, field): "moves matrices otherwise: tests/train/test_muon.py"
        for stage in FIELDS
        for field in ("optimizer", "muon_learning_rate")
    },
    ("vqgan", "model.quantizer"): "training has one: tests/train/test_vqgan_stage.py",
    **{
        ("vqgan", f"model.{field}"): "training refuses it: tests/train/test_vqgan_stage.py"
        for field in ("unit_pixels", "wavelets")
    },
    **{
        (stage, "grad_dtype"): "needs half precision: tests/train/test_prior_stage.py"
        for stage in ("prior", "progressive")
    },
    **{
        (stage, "moments"): "rounds between updates: tests/train/test_prior_stage.py"
        for stage in ("prior", "progressive")
    },
    **{
        (stage, "kernels"): "needs precision float16: tests/train/test_resblock_scaling.py"
        for stage in ("prior", "progressive")
    },
}


def rows(*places):
    """(stage, field, other value, place) of all rows whose change shows in one of the places."""
    return [
        (name, field, *row)
        for name, fields in FIELDS.items()
        for field, row in fields.items()
        if row[1] in places and (name, field) not in ELSEWHERE
    ]
