"""Two updates of each stage on meshes of 8 devices, for parallel/test_mesh.py.

The one argument is a folder, where their results become files. JAX_NUM_CPU_DEVICES has to be 8.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import tiny

from dalle_jax.generate import tensor_file
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.clip import CLIPConfig
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.parallel.mesh import MeshConfig, make_mesh, place_batch, place_captions
from dalle_jax.parallel.powersgd import PowerSGDConfig
from dalle_jax.parallel.powersgd_groups import PowerSGDGroups
from dalle_jax.planner import compiled_step
from dalle_jax.train import state as state_lib
from dalle_jax.train.clip_stage import ClipStage, short_clip_run
from dalle_jax.train.dvae_stage import DVAEStage, short_dvae_run
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorStage, short_prior_run
from dalle_jax.train.train_step import make_train_step

LOOP = LoopConfig(steps=100)
MUON = MeshConfig(data=2, fsdp=4)
PRIOR = {"width": 32, "depth": 4, "heads": 4, "text_vocabulary": 40, "text_length": 8}
PRIOR |= {"grid": 4, "codes": 32, "kernel": 3}
CLIP = {"px": 16, "patch": 8, "image_width": 16, "image_depth": 2, "image_heads": 2}
CLIP |= {"text_width": 16, "text_depth": 2, "text_heads": 2, "text_length": 9, "features": 16}
# case: stage, data x fsdp x tensor, micro-batches, rank of gradients
CASES = {
    "dvae": ("dvae", (2, 4, 1), 1, None),
    "prior all, accumulated": ("prior", (2, 2, 2), 2, None),
    "prior with Muon": ("muon", (2, 4, 1), 1, None),
    "prior at full rank": ("prior", (2, 4, 1), 1, 8),  # 32 columns in 4 slices
    "clip": ("clip", (2, 2, 2), 1, None),
}


def stage(name, **changes):
    if name == "dvae":
        sizes = DVAEConfig(width=8, groups=2, blocks_per_group=1, codes=16, code_width=8)
        run = short_dvae_run(model=sizes, loop=LOOP, px=8, batch_size=16, kmeans_init=False)
        return DVAEStage(run, init_images=lambda: None, validation=lambda: iter(()))
    if name == "clip":
        sizes = CLIPConfig(**CLIP, text_vocabulary=40)
        run = short_clip_run(model=sizes, loop=LOOP, batch_size=16, micro_batch=8)
        return ClipStage(run, validation={})
    changes = {"model": PriorConfig(**PRIOR), "scan_layers": True, "remat": True} | changes
    if name == "muon":  # one kind of layer compiles in a third of the time
        changes |= {"model": PriorConfig(**PRIOR, attention="dense"), "optimizer": "muon"}
    run = short_prior_run(loop=LOOP, batch_size=16, **changes)
    return PriorStage(
        run,
        codec_model=tiny.model(),
        tokenizer=tiny.tokenizer(),
        validation=lambda: iter(()),
        captions=(),
    )


def batch(name):
    rng = np.random.default_rng(0)
    if name == "dvae":
        return {"image": rng.integers(0, 256, (16, 8, 8, 3), np.uint8)}
    text = rng.integers(0, 40, (16, 7)).astype(np.int32)  # no pads: accumulation weighs them
    if name == "clip":
        return {"image": rng.integers(0, 256, (16, 16, 16, 3), np.uint8), "text": text}
    return {"text": text, "codes": rng.integers(0, 32, (16, 4, 4)).astype(np.int32)}


def two_updates(name, mesh=None, accumulation_steps=1, rank=None):
    """State and metrics after them; without a mesh on one device."""
    this, data, shardings, key = stage(name), batch(name), None, jax.random.key(0)
    groups = PowerSGDGroups(PowerSGDConfig(rank=rank), mesh) if rank else None

    def create(key):
        return state_lib.init_state(this, key, groups)

    if mesh is None:
        state = jax.jit(create)(key)
    else:
        shardings = state_lib.state_shardings(jax.eval_shape(create, key), mesh, this.rules, groups)
        state = jax.jit(create, out_shardings=shardings)(key)
        data = place_batch(mesh, data)
    update = make_train_step(
        this, shardings=shardings, groups=groups, accumulation_steps=accumulation_steps
    )
    for _ in range(2):
        state, metrics = update(state, data)
    if shardings is not None:
        jax.tree.map(lambda x, place: _check(x.sharding, place, x.ndim), state, shardings)
    assert metrics.pop("skipped", 0) == 0
    return {"params": state.params, "ema_params": state.ema_params, "metrics": metrics}


def _check(sharding, place, ndim):
    assert sharding.is_equivalent_to(place, ndim), (sharding, place)


def sent_with_muon():
    """All that devices send in an update of a small prior."""
    run = stage("muon", precision="bfloat16").run
    sent, _ = compiled_step.compiled_update(
        dataclasses.replace(run, loop=LoopConfig(steps=1, mesh=MUON))
    )
    return [dataclasses.asdict(x) for x in sent]


def drawn(**where):
    """A model whose priors lie there, and images of two captions and of one, by both decoders."""
    model = tiny.model(**tiny.progressive_parts(), **where)
    images = [
        model.generate(captions, n=n, seed=1, sampling=SamplingConfig(decoder=decoder))
        for captions, n in ((["red apple", "sky"], 2), (["red apple"], 4))
        for decoder in ("autoregressive", "progressive")
    ]
    return model, np.concatenate([x.reshape(4, *x.shape[2:]) for x in images])


def check_captions(params):
    """Two groups of devices have a caption each, or share one with two of its four images each."""
    keys = jax.random.split(jax.random.key(0), 4)
    for captions in (np.arange(6).reshape(2, 3), np.arange(3).reshape(1, 3)):
        text, spread = place_captions(params, captions, keys)
        assert {x.data.shape for x in text.addressable_shards} == {(1, 3)}
        assert {x.data.shape for x in spread.addressable_shards} == {(2,)}
        assert np.asarray(text).tolist() == np.repeat(captions, 2 // len(captions), 0).tolist()
    odd = np.arange(9).reshape(3, 3)
    assert place_captions(params, odd, keys[:3])[0] is odd


def main(folder):
    (folder / "sent.json").write_text(json.dumps(sent_with_muon()))
    tensor_file.CHUNK = 2**9  # bytes: tensors of the tiny model leave their devices in pieces
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    for name, where in (("whole", {}), ("spread", {"mesh": mesh})):
        model, images = drawn(**where)
        model.save(folder / name)
        np.save(folder / f"{name}.npy", images)
    assert not model.priors["prior"][1]["head"]["image"]["kernel"].is_fully_replicated
    check_captions(model.priors["prior"][1])
    for case, (name, sizes, *options) in CASES.items():
        mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
        leaves = jax.tree.leaves(two_updates(name, mesh, *options))
        np.savez(folder / f"{case}.npz", *[np.asarray(x) for x in leaves])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
