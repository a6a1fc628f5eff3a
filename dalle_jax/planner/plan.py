"""What a training run of the prior asks of its devices, before any is rented.

The real update is compiled for as many virtual devices as there will be, from shapes alone, so that
what they send is read and not guessed. Memory is counted array by array; step times follow from
published peaks of the hardware by a formula.

Letters: B images of a backward pass on one device, T positions, D width, F mlp, L layers.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dalle_jax.errors import UserError
from dalle_jax.models.autoregressive_prior import AutoregressivePrior, init_params
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.parallel import powersgd
from dalle_jax.parallel.mesh import DATA, FSDP, TENSOR
from dalle_jax.parallel.powersgd import PowerSGDConfig
from dalle_jax.parallel.sharding_rules import shardings
from dalle_jax.planner.collectives import Collective
from dalle_jax.train import state as state_lib
from dalle_jax.train.prior_stage import PriorRun, PriorStage

GiB = 2**30  # what data sheets call GB of memory
USABLE = 0.9  # of a device's memory; the rest goes to the runtime, its programs and fragments


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A device by its data sheet: dense 16-bit products, and bytes that it sends in one direction.

    The links are those that a ring uses: on a TPU the two of one axis of the torus.
    """

    memory: int
    """Bytes."""
    flops: float
    """16-bit FLOP/s."""
    near: float
    """Bytes/s to devices of the same machine, or along an axis of a TPU's torus."""
    far: float
    """Bytes/s to devices of other machines; ours for the V100, 100 Gbit/s for each machine of 8."""
    machine: int | None = 8
    """Devices that are near one another; None for all."""


CHIPS = {
    "V100-16GB": Chip(memory=16 * GiB, flops=125e12, near=150e9, far=100e9 / 8 / 8),
    "A100-80GB": Chip(memory=80 * GiB, flops=312e12, near=300e9, far=25e9),
    "H100-80GB": Chip(memory=80 * GiB, flops=989e12, near=450e9, far=50e9),
    "H200-141GB": Chip(memory=141 * GiB, flops=989e12, near=450e9, far=50e9),
    "TPU-v4": Chip(memory=32 * GiB, flops=275e12, near=100e9, far=100e9, machine=None),
    "TPU-v5e": Chip(memory=16 * GiB, flops=197e12, near=100e9, far=100e9, machine=None),
    "TPU-v5p": Chip(memory=95 * GiB, flops=459e12, near=200e9, far=200e9, machine=None),
    "TPU-v6e": Chip(memory=32 * GiB, flops=918e12, near=224e9, far=224e9, machine=None),
}


def parameters(run: PriorRun) -> int:
    """Number of parameters, embeddings and heads included."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(state_shapes(run).params))


def bytes_per_device(run: PriorRun, mesh: dict[str, int]) -> dict[str, int]:
    """Counts what one device holds when an update needs most.

    Args:
      run: the settings; its own mesh is not looked at.
      mesh: sizes of data, fsdp and tensor.
    Returns:
      Bytes by kind: "weights", "gradients", "moments" and "ema", as stored and cut as
      `parallel.rules` says; "kept", what each image leaves for the backward pass; "recomputed",
      what one layer adds to that when it is computed again, or nothing without `remat`; "gathered",
      the kernels of two layers in the precision of the products, one in use and one on its way,
      one layer's gradient before it is cut, and both heads with their gradients; "total".
      Activations are counted whole for tensor > 1.
    Raises:
      UserError: if a large parameter or the batch cannot be cut evenly.
    Source: ours.
    """
    state = state_shapes(run)
    places = shardings(state, AbstractMesh(tuple(mesh.values()), tuple(mesh)), PriorStage.rules)

    def held(tree, places):
        sizes = jax.tree.map(_part_bytes, tree, places)
        return sum(jax.tree.leaves(sizes))

    weights = held(state.params, places.params)
    images = images_per_device(run, mesh)
    shallow = dataclasses.replace(run.model, depth=1)
    inside = image_bytes(shallow, run) - image_bytes(shallow, run, remat=True)
    layer = _kernel_sizes(state.params["layers"]) // run.model.depth // mesh[TENSOR]
    heads = _kernel_sizes(state.params["head"]) // mesh[TENSOR]
    number = jnp.dtype(run.precision).itemsize
    gradient = min(jnp.dtype(x).itemsize for x in (run.grad_dtype, run.kernels))
    if mesh[FSDP] > 1:
        whole = layer * (2 * number + gradient) + 2 * heads * 4
    else:
        whole = (layer + heads) * number
    sizes = {
        "weights": weights,
        "gradients": weights * (2 if run.loop.accumulation_steps > 1 else 1),
        "moments": held(state.opt_state, places.opt_state),
        "ema": 0 if run.loop.ema_on_host else held(state.ema_params, places.ema_params),
        "kept": images * image_bytes(run.model, run, remat=run.remat),
        "recomputed": images * inside if run.remat else 0,
        "gathered": whole,
    }
    return sizes | {"total": sum(sizes.values())}


def paper_bytes_per_device(run: PriorRun, mesh: dict[str, int]) -> dict[str, int]:
    """Counts as `bytes_per_device` what the formats of the paper would take.

    Kernels of layers have 2 bytes, and so do their gradients, mean, variance (6-10 bits) and error
    buffer, which the gradient is added to; all else has 4. The EMA lies in the memory of the CPU.

    Source: Ramesh et al. 2021, section 2.4 and appendices D and E.
    """
    loop = dataclasses.replace(run.loop, ema_on_host=True)
    formats = {"precision": "float16", "kernels": "float16", "moments": "16-bit"}
    return bytes_per_device(dataclasses.replace(run, loop=loop, **formats), mesh)


def images_per_device(run: PriorRun, mesh: dict[str, int]) -> int:
    """Images of one backward pass on one device.

    Raises:
      UserError: if the batch cannot be spread evenly.
    """
    parts = mesh[DATA] * mesh[FSDP] * run.loop.accumulation_steps
    if run.batch_size % parts:
        raise UserError(
            f"a batch of {run.batch_size} images cannot be spread over data={mesh[DATA]} x "
            f"fsdp={mesh[FSDP]} devices in {run.loop.accumulation_steps} micro-batches; choose a "
            f"multiple of {parts}, or more of tensor"
        )
    return run.batch_size // parts


@cache
def image_bytes(config: PriorConfig, run: PriorRun, *, remat: bool = False) -> int:
    """Bytes that one image leaves between the forward and the backward pass, by JAX's own count.

    It is the difference between two images and one, so that weights do not count.
    """
    options = {"dtype": jnp.dtype(run.precision), "scan": remat and run.scan_layers}
    prior = AutoregressivePrior(config, remat=remat, **options)

    def kept(images):
        text = jax.ShapeDtypeStruct((images, config.text_length - 1), jnp.int32)
        codes = jax.ShapeDtypeStruct((images, config.image_length), jnp.int32)
        params = jax.eval_shape(partial(init_params, config), jax.random.key(0))

        def forward(params, text, codes):
            return jax.vjp(lambda p: prior.apply({"params": p}, text, codes), params)

        logits, backward = jax.eval_shape(forward, params, text, codes)
        leaves = jax.tree.leaves((logits, backward))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    return kept(2) - kept(1)


def all_reduce_bytes(run: PriorRun, mesh: dict[str, int], *, rank: int) -> dict[str, int]:
    """Sizes of what one device averages with those of other groups in an update.

    Args:
      run: the settings; its grad_dtype are the type of what is sent of the kernels' gradients.
      mesh: sizes of data, fsdp and tensor.
      rank: of PowerSGD, for the parts of all devices of a group together, as in the paper.
    Returns:
      "plain", without compression, and "powersgd"; 0 for one group alone.
    Source: Ramesh et al. 2021, appendix E, table 2.
    """
    if mesh[DATA] == 1:
        return {"plain": 0, "powersgd": 0}
    shards = mesh[FSDP] * mesh[TENSOR]
    sizes = powersgd.sent_bytes(
        state_shapes(run).params,
        config=PowerSGDConfig(rank=max(rank // shards, 1)),
        shards=shards,
        bytes_per_number=jnp.dtype(run.grad_dtype).itemsize,
    )
    sent = sizes["p"] + sizes["q"] + sizes["uncompressed"]
    return {"plain": sizes["plain"] // shards, "powersgd": sent // shards}


def step_flops(run: PriorRun) -> float:
    """FLOP of an update over all devices: 2 for each multiplication with a weight.

    A backward pass has twice those of a forward pass; with `remat` the layers' is done once more.
    Attention is left out: at the published sizes it adds 1 to 3 %.
    """
    c = run.model
    layers = (4 + 2 * c.mlp_ratio) * c.width**2 * c.depth * c.length
    heads = c.width * ((c.text_length - 1) * c.text_vocabulary + c.image_length * c.codes)
    return 2.0 * run.batch_size * (layers * (4 if run.remat else 3) + heads * 3)


def estimate_step_seconds(
    run: PriorRun,
    mesh: dict[str, int],
    sent: list[Collective],
    chip: Chip,
    *,
    efficiency: float,
    saved: int = 0,
) -> dict[str, float]:
    """Estimates the time of an update from peaks.

    compute = FLOP / (devices x peak x efficiency); within = bytes that a device sends along fsdp
    and tensor / its link, the near one if such a group fits into a machine; between = bytes along
    data / the far link. An update takes at least the greatest of the three and, if nothing
    overlaps, their sum; it waits for nothing else in this estimate.

    Args:
      run: the settings.
      mesh: sizes of data, fsdp and tensor.
      sent: from `compiled_update`.
      chip: one device.
      efficiency: share of the peak that products reach, in (0, 1].
      saved: bytes that PowerSGD takes off the arrays that go along data.
    Returns:
      "compute", "within", "between", "least" and "most", in seconds.
    Source: ours.
    """
    group, devices = mesh[FSDP] * mesh[TENSOR], math.prod(mesh.values())
    in_machine = chip.machine is None or group <= chip.machine
    all_near = chip.machine is None or devices <= chip.machine
    along_data = sum(x.sent_bytes for x in sent if DATA in x.axes)
    along_data -= 2 * saved * (mesh[DATA] - 1) / mesh[DATA]
    along_group = sum(x.sent_bytes for x in sent if DATA not in x.axes)
    parts = {
        "compute": step_flops(run) / (devices * chip.flops * efficiency),
        "within": along_group / (chip.near if in_machine else chip.far),
        "between": along_data / (chip.near if all_near else chip.far),
    }
    return parts | {"least": max(parts.values()), "most": sum(parts.values())}


def stage_of(run: PriorRun) -> PriorStage:
    """The stage of a run, without anything to train on."""
    return PriorStage(run, codec_model=None, tokenizer=None, validation=lambda: (), captions=())


@cache
def state_shapes(run: PriorRun) -> state_lib.TrainState:
    """Shapes and dtypes of its state."""
    return jax.eval_shape(partial(state_lib.init_state, stage_of(run)), jax.random.key(0))


def _part_bytes(leaf, place):
    itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(place.shard_shape(leaf.shape)) * itemsize


def _kernel_sizes(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return sum(math.prod(x.shape) for path, x in leaves if path[-1].key == "kernel")
