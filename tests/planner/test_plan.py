"""The plan of a run is what one can count by hand, and the compiled update sends what it has to."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dalle_jax.errors import UserError
from dalle_jax.models.prior_config import PUBLISHED, PriorConfig
from dalle_jax.parallel.mesh import MeshConfig
from dalle_jax.planner import compiled_step, plan, topology
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorRun

SCRIPT = Path(__file__).parents[2] / "experiments" / "dalle_12b.py"
SIZES = {"width": 32, "depth": 4, "heads": 4, "text_vocabulary": 40, "text_length": 8}
SIZES |= {"grid": 4, "codes": 32, "kernel": 3}
MESH = {"data": 2, "fsdp": 4, "tensor": 1}
D, L, T = 32, 4, 24
KERNELS = 12 * D * D * L
BIASES = (3 + 1 + 4 + 1) * D * L
NORMS = 4 * D * L + 2 * D
TABLES = (40 + 7 + 7 + 32 + 4 + 4) * D
STARTS = 2 * D
HEADS = D * (40 + 32)
ONE_KIND = PriorConfig(**SIZES, attention="dense")  # of layers: compiles in a third


def run(**changes):
    settings = {"model": PriorConfig(**SIZES), "loop": LoopConfig(steps=10), "batch_size": 8}
    return PriorRun(**(settings | changes))


@pytest.fixture(scope="module")
def printed():
    sizes = [f"--model.{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    command = [sys.executable, SCRIPT, "plan", "--json", "--devices=8", "--mesh.fsdp=4"]
    done = subprocess.run(
        [*command, "--batch-size=8", "--rank=16", "--chip=TPU-v5e", *sizes],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rematerialization" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_compiled_update_gathers_each_kernel_twice_and_scatters_its_gradient_once(printed):
    sent = {(x["kind"], tuple(x["axes"])): x for x in printed["collectives"]}
    gathered = sent["all-gather", ("fsdp",)]["array_bytes"]
    expected = 2 * KERNELS * 2 + HEADS * 4  # bfloat16, forward and backward; heads stay
    assert expected <= gathered < expected * 1.01
    scattered = sent["reduce-scatter", ("fsdp",)]["array_bytes"]
    expected = KERNELS * 4 + HEADS * 4  # sums of gradients are float32
    assert expected <= scattered < expected * 1.01
    averaged = sent["all-reduce", ("data",)]["array_bytes"]  # parts of kernels, heads and tables
    expected = (KERNELS * 4 + HEADS * 4 + (40 + 32 + 7 + 7) * D * 4) // 4
    assert expected <= averaged < expected * 1.01


@pytest.mark.slow
def test_the_plan_prints_what_the_functions_count(printed):
    assert printed["parameters"] == KERNELS + BIASES + NORMS + TABLES + STARTS + HEADS
    assert printed["bytes_per_device"] == plan.bytes_per_device(run(), MESH)
    assert printed["all_reduce_bytes"] == plan.all_reduce_bytes(run(), MESH, rank=16)
    assert printed["mesh"] == MESH
    assert printed["images_per_device"] == 1
    assert printed["fits"] is True
    assert printed["smallest_fsdp_that_fits"] == 1
    assert printed["step_seconds"]["plain"]["least"] > 0


def test_bytes_are_those_of_the_rules():
    held = plan.bytes_per_device(run(), MESH)
    weights = 4 * ((KERNELS + TABLES + HEADS) // 4 + BIASES + NORMS + STARTS)
    assert held["weights"] == held["gradients"] == held["ema"] == weights
    assert 2 * weights < held["moments"] < 2 * weights + 100  # and counters
    layer = 12 * D * D * 2  # of bfloat16
    assert held["gathered"] == 2 * layer + 12 * D * D * 4 + 2 * HEADS * 4
    smaller = plan.bytes_per_device(run(grad_dtype="bfloat16"), MESH)
    assert smaller["gathered"] == 3 * layer + 2 * HEADS * 4
    stream = T * D * 4
    assert L * stream < held["kept"] < (L + 12) * stream  # logits and embeddings too
    assert held["total"] == sum(size for name, size in held.items() if name != "total")


def test_the_papers_formats_take_two_bytes_for_each_number_of_a_kernel():
    held = plan.paper_bytes_per_device(run(), MESH)
    others = (TABLES + HEADS) // 4 + BIASES + NORMS + STARTS
    assert held["weights"] == held["gradients"] == KERNELS // 4 * 2 + 4 * others
    whole = plan.bytes_per_device(run(), MESH)
    counters = whole["moments"] - 2 * whole["weights"]
    assert held["moments"] == KERNELS // 4 * 4 + 8 * others + counters
    assert held["gathered"] == 3 * 12 * D * D * 2 + 2 * HEADS * 4
    assert held["ema"] == 0


def test_what_a_run_stores_in_16_bits_or_on_the_host_is_counted_so():
    stored = {"precision": "float16", "kernels": "float16", "moments": "16-bit"}
    loop = dataclasses.replace(run().loop, ema_on_host=True)
    held = plan.bytes_per_device(run(**stored, loop=loop), MESH)
    paper = plan.paper_bytes_per_device(run(), MESH)
    for kind in ("weights", "gradients", "moments", "ema"):
        assert held[kind] == paper[kind]
    one = run(**stored, loop=loop, batch_size=1, model=ONE_KIND)
    found = compiled_step.compiled_for(one, jax.devices()[:1])
    held = plan.bytes_per_device(one, {"data": 1, "fsdp": 1, "tensor": 1})
    state, batch = held["weights"] + held["moments"], 4 * (7 + 16)
    scales = 2 * 4 * 2 * L
    assert state + batch + scales < found["arguments"] < state + batch + scales + 64


def test_the_published_rank_saves_what_table_2_says():
    paper = dataclasses.replace(run(), model=PUBLISHED["12B"], batch_size=1024)
    mesh = {"data": 128, "fsdp": 8, "tensor": 1}
    sizes = plan.all_reduce_bytes(paper, mesh, rank=896)
    kernels = 12 * 3968**2 * 64 * 4 // 8  # bytes of a device's part
    left = 5 * 896 / (8 * 3968)
    assert sizes["plain"] - sizes["powersgd"] == pytest.approx(kernels * (1 - left), rel=0.001)
    assert plan.all_reduce_bytes(paper, {"data": 1, "fsdp": 8, "tensor": 1}, rank=896) == {
        "plain": 0,
        "powersgd": 0,
    }


def test_flops_of_an_update_are_six_a_weight_and_two_more_to_compute_layers_again():
    heads = D * (7 * 40 + 16 * 32)
    assert plan.step_flops(run(remat=False)) == 6 * 8 * (KERNELS * T + heads)
    assert plan.step_flops(run()) == 8 * (8 * KERNELS * T + 6 * heads)


def test_a_batch_that_does_not_go_around_is_refused():
    with pytest.raises(ValueError, match="a batch of 8 images cannot be spread over data=4 x"):
        plan.images_per_device(run(), {"data": 4, "fsdp": 4, "tensor": 1})


def test_the_update_is_compiled_for_the_devices_that_are_given():
    one = run(batch_size=1, precision="float32", model=ONE_KIND)
    found = compiled_step.compiled_for(one, jax.devices()[:1])
    held = plan.bytes_per_device(one, {"data": 1, "fsdp": 1, "tensor": 1})
    state, batch = held["weights"] + held["moments"] + held["ema"], 4 * (7 + 16)
    assert state + batch < found["arguments"] < state + batch + 64  # a key and counters
    assert found["temporaries"] > 0
    with pytest.raises(UserError, match="a mesh of fsdp=2 x tensor=1 does not fit 1 devices"):
        loop = dataclasses.replace(one.loop, mesh=MeshConfig(fsdp=2))
        compiled_step.compiled_for(dataclasses.replace(one, loop=loop), jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed"
)
def test_a_tpus_compiler_gives_the_state_the_bytes_that_are_counted():
    loop = LoopConfig(steps=10, mesh=MeshConfig(fsdp=4))
    found = compiled_step.compiled_for(run(loop=loop), topology.tpu_devices("v5e:2x2"))
    held = plan.bytes_per_device(run(loop=loop), {"data": 1, "fsdp": 4, "tensor": 1})
    state = held["weights"] + held["moments"] + held["ema"]
    assert state < found["arguments"] < 1.2 * state + 2**16  # a TPU pads small arrays
    assert found["temporaries"] > 0
