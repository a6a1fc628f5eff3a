"""The paper's run: 256 px, 12 billion parameters, 1,024 images an update.

    python experiments/dalle_12b.py plan --devices 1024 --chip H100-80GB
    python experiments/dalle_12b.py all --data images/ --workdir /shared/runs/dalle

`plan` says what the prior's training asks of each device and how long an update may take; it
needs no accelerator. docs/dalle_12b.md has its tables. The defaults of the other commands are the
paper's; nobody has run them to the end.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax
import tyro

from dalle_jax.data.record_filters import PAPER, Filters
from dalle_jax.errors import UserError
from dalle_jax.models.prior_config import PUBLISHED
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.parallel.mesh import DATA, FSDP, TENSOR, MeshConfig
from dalle_jax.planner import plan as planning
from dalle_jax.planner.compiled_step import compiled_for, compiled_update
from dalle_jax.planner.topology import tpu_devices
from dalle_jax.terminal import complaints
from dalle_jax.train.clip_stage import ClipRun
from dalle_jax.train.data_options import FolderOptions
from dalle_jax.train.dvae_stage import DVAERun
from dalle_jax.train.experiment import main
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorRun
from dalle_jax.train.vqgan_stage import VQGANRun

RANKS = {"2.8B": 512, "5.6B": 640, "12B": 896}  # of PowerSGD, in all; table 1


@dataclass(frozen=True, kw_only=True)
class PaperOptions(FolderOptions):
    """A folder of images with captions, filtered as the paper's were."""

    filters: Filters = PAPER


def dvae() -> DVAERun:
    """32 x 32 codes of 8,192 for images of 256 px; on 64 devices in the paper."""
    return DVAERun()


def vqgan() -> VQGANRun:
    """As many codes for as many pixels, by a network of the sizes released with f = 8."""
    return VQGANRun(model=VQGANConfig(multipliers=(1, 1, 2, 4), attention=(8,), codes=8192))


def prior() -> PriorRun:
    """The 12-billion-parameter model; 8 devices share its state, as in the paper.

    No evaluation and no sheets while it trains: both would gather the whole EMA on each device.
    """
    loop = LoopConfig(
        steps=430_000,
        ema_every=25,
        ema_decay=0.99,
        evaluate_every=None,
        sheet_every=None,
        mesh=MeshConfig(fsdp=8),
    )
    return PriorRun(loop=loop)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Say what the prior's training asks of its devices."""

    run: Annotated[PriorRun, tyro.conf.arg(name="")] = field(default_factory=prior)
    size: Literal["2.8B", "5.6B", "12B"] | None = None
    """A size of table 1, in the place of --model.width, --model.heads and --model.depth."""
    devices: int = 1024
    """Devices in all."""
    chip: str = "H100-80GB"
    """Kind of device: a name of `dalle_jax.planner.plan.CHIPS`."""
    efficiency: float = 0.4
    """Share of the chip's peak that products are taken to reach."""
    topology: str | None = None
    """A slice of TPUs, such as v5e:16x16, whose compiler is asked too; --devices and --chip are
    then those of the slice. Needs dalle_jax[tpu]."""
    rank: int | None = None
    """Of PowerSGD, in all; None for the paper's of this width."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self):
        if self.chip not in planning.CHIPS:
            raise UserError(f"chip is {self.chip!r}, but must be one of {list(planning.CHIPS)}")
        if not 0 < self.efficiency <= 1:
            raise UserError(f"efficiency is {self.efficiency}, but must lie in (0, 1]")


def plan(args: Sequence[str]) -> None:
    """Reads the options of `plan` and prints what comes out.

    Raises:
      SystemExit: 2 with one sentence if something given cannot be used.
    """
    with complaints("dalle_12b.py"):
        options = tyro.cli(PlanOptions, prog="dalle_12b.py plan", args=args)
        jax.config.update("jax_platforms", "cpu")
        tpus = None
        if options.topology is not None:
            tpus = tpu_devices(options.topology)
            chip = f"TPU-{options.topology.partition(':')[0]}"
            options = dataclasses.replace(options, devices=len(tpus), chip=chip)
        jax.config.update("jax_num_cpu_devices", options.devices)
        jax.config.update("jax_disable_most_optimizations", True)  # its program never runs
        found = planned(options)
        if tpus is not None:
            jax.config.update("jax_disable_most_optimizations", False)  # this program would run
            found["tpu_bytes"] = compiled_for(sized(options), tpus)
        print(json.dumps(found) if options.json else report(options, found))


def planned(options: PlanOptions) -> dict:
    """Everything that `plan` says, as one JSON object."""
    run, chip = sized(options), planning.CHIPS[options.chip]
    mesh = mesh_sizes(run.loop.mesh, options.devices)
    held = planning.bytes_per_device(run, mesh)
    paper = planning.paper_bytes_per_device(run, mesh)
    sent, compiled = compiled_update(run)
    rank = (
        options.rank or RANKS[min(RANKS, key=lambda s: abs(PUBLISHED[s].width - run.model.width))]
    )
    reduced = planning.all_reduce_bytes(run, mesh, rank=rank)
    seconds = {
        name: planning.estimate_step_seconds(
            run, mesh, sent, chip, efficiency=options.efficiency, saved=reduced["plain"] - bytes_
        )
        for name, bytes_ in reduced.items()
    }
    room = chip.memory * planning.USABLE
    return {
        "model": dataclasses.asdict(run.model),
        "parameters": planning.parameters(run),
        "chip": options.chip,
        "devices": options.devices,
        "mesh": mesh,
        "images_per_device": planning.images_per_device(run, mesh),
        "bytes_per_device": held,
        "bytes_per_device_in_the_papers_formats": paper,
        "usable_bytes": int(room),
        "fits": held["total"] <= room,
        "fits_in_the_papers_formats": paper["total"] <= room,
        "smallest_fsdp_that_fits": smallest_fsdp(run, options.devices, room),
        "compiled_bytes": compiled,
        "collectives": [
            dataclasses.asdict(x) | {"sent_bytes": int(x.sent_bytes)}
            for x in sent
            if x.array_bytes > 1e-4 * held["weights"]
        ],
        "powersgd_rank": rank,
        "all_reduce_bytes": reduced,
        "step_seconds": seconds,
        "efficiency": options.efficiency,
    }


def sized(options: PlanOptions) -> PriorRun:
    """The run, of the size that is asked for."""
    if options.size is None:
        return options.run
    return dataclasses.replace(options.run, model=PUBLISHED[options.size])


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Sizes of the axes for so many devices."""
    data = config.data or devices // (config.fsdp * config.tensor)
    sizes = {DATA: data, FSDP: config.fsdp, TENSOR: config.tensor}
    if data * config.fsdp * config.tensor != devices:
        raise UserError(
            f"a mesh of fsdp={config.fsdp} x tensor={config.tensor} does not fit {devices} "
            "devices; their product has to divide that number"
        )
    return sizes


def smallest_fsdp(run: PriorRun, devices: int, room: float) -> int | None:
    """The fewest devices that can share the state, a power of two; None if none are enough."""
    fsdp = 1
    while fsdp <= devices and devices % fsdp == 0:
        mesh = {DATA: devices // fsdp, FSDP: fsdp, TENSOR: 1}
        try:
            if planning.bytes_per_device(run, mesh)["total"] <= room:
                return fsdp
        except UserError:  # a parameter that cannot be cut into so many parts
            return None
        fsdp *= 2
    return None


def report(options: PlanOptions, found: dict) -> str:
    """The same for people."""
    mesh, gb = found["mesh"], 1e-9
    lines = [
        f"{found['parameters']:,} parameters on {found['devices']} x {found['chip']}: "
        f"{mesh[DATA]} groups of fsdp {mesh[FSDP]} x tensor {mesh[TENSOR]}, "
        f"{found['images_per_device']} images a device",
        "",
        f"{'GB a device':24} {'here':>8} {'paper formats':>14}",
    ]
    paper = found["bytes_per_device_in_the_papers_formats"]
    for name, size in found["bytes_per_device"].items():
        lines.append(f"{name:24} {size * gb:8.2f} {paper[name] * gb:14.2f}")
    room = found["usable_bytes"] * gb
    verdict = "fits" if found["fits"] else "does not fit"
    lines += [
        "",
        f"It {verdict} into {room:.1f} GB (10^9 bytes), nine tenths of the device's memory.",
    ]
    if not found["fits"]:
        fsdp = found["smallest_fsdp_that_fits"]
        lines.append(
            f"--mesh.fsdp {fsdp} would fit."
            if fsdp
            else "No fsdp fits with tensor 1; take other devices, or --precision and "
            "--accumulation-steps."
        )
    if tpu := found.get("tpu_bytes"):
        total, has = sum(tpu.values()), planning.CHIPS[options.chip].memory
        verdict = "fits" if total <= has else "does not fit"
        lines += [
            "",
            f"The compiler of {options.topology}, GB a device: "
            + ", ".join(f"{name} {size * gb:.2f}" for name, size in tpu.items())
            + f"; {total * gb:.2f} in all, which {verdict} into {has * gb:.2f}.",
        ]
    lines += [
        "",
        f"Read from the update compiled for {found['devices']} virtual devices, all layers:",
        f"{'a device and update':20} {'along':14} {'members':>8} {'count':>6} {'arrays GB':>10} "
        f"{'sent GB':>8}",
    ]
    for x in found["collectives"]:
        lines.append(
            f"{x['kind']:20} {' '.join(x['axes']):14} {x['members']:8} {x['count']:6} "
            f"{x['array_bytes'] * gb:10.2f} {x['sent_bytes'] * gb:8.2f}"
        )
    reduced = found["all_reduce_bytes"]
    lines += [
        "",
        f"Averaged between groups: {reduced['plain'] * gb:.2f} GB a device, with PowerSGD of rank "
        f"{found['powersgd_rank']} {reduced['powersgd'] * gb:.2f} GB (table 2).",
        "",
        f"{'seconds an update':20} "
        + " ".join(f"{name:>8}" for name in found["step_seconds"]["plain"]),
    ]
    for name, seconds in found["step_seconds"].items():
        lines.append(f"{name:20} " + " ".join(f"{x:8.2f}" for x in seconds.values()))
    lines.append(
        f"Estimated at {found['efficiency']:.0%} of the peak; "
        "`dalle_jax.planner.plan.estimate_step_seconds` has the formula, `CHIPS` the peaks."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["plan"]:
        plan(sys.argv[2:])
    else:
        runs = {"dvae": dvae(), "vqgan": vqgan(), "prior": prior(), "clip": ClipRun()}
        main("dalle_12b", data=PaperOptions, **runs)
