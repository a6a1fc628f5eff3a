"""The benchmark scripts give well-formed lines and count work rightly; nothing here is timed."""

import dataclasses
import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.prior_config import PriorConfig, ProgressiveConfig
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.stage import Stage

SCRIPTS = Path(__file__).parent.parent / "experiments" / "benchmarks"
PRIOR = PriorConfig(
    width=8, depth=2, heads=2, text_vocabulary=20, text_length=4, grid=2, codes=6, kernel=3
)
DVAE = dataclasses.replace(tiny.DVAE_CONFIG, groups=2)


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


def script(name):
    """Loads a script by its file, since names like data are those of rooms under tests, too."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(monkeypatch):
    measure = script("measure")
    peaks = {"gemm_gflops": 100.0, "read_gbs": 30.0}
    monkeypatch.setattr(measure, "machine", lambda: peaks)
    return measure.Report("some bench", as_json=True)


def lines(capsys):
    """The JSON lines printed so far, checked for their form, as {metric: value}."""
    measured = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line in measured:
        assert list(line) == ["bench", "case", "metric", "value", "unit", "target", "machine"]
        assert set(line["machine"]) == {"gemm_gflops", "read_gbs"}
        assert line["value"] > 0
        assert line["target"] is None or line["target"] > 0
    return {line["metric"]: line["value"] for line in measured}


@pytest.mark.parametrize(
    "name",
    ["attention", "data", "decode", "products", "serve", "startup", "tokenise", "train_step"],
)
def test_help_explains_every_option(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--json", "--quick", "--only"))
    assert ("--peer" in text) == (name in ("decode", "tokenise", "train_step"))


def test_one_line_holds_a_measurement_and_the_machine(report, capsys):
    report.add("row T=1280", "speedup", 3.60004, "x", 3.5)
    assert json.loads(capsys.readouterr().out) == {
        "bench": "some bench",
        "case": "row T=1280",
        "metric": "speedup",
        "value": 3.6,
        "unit": "x",
        "target": 3.5,
        "machine": {"gemm_gflops": 100.0, "read_gbs": 30.0},
    }


def test_the_machine_has_a_peak_and_a_bandwidth():
    measured = script("measure").machine(size=16, megabytes=1)
    assert set(measured) == {"gemm_gflops", "read_gbs"}
    assert min(measured.values()) > 0


def test_attention_compares_time_and_memory_with_dense(report, capsys):
    sizes = {"text": 3, "grid": 2, "heads": 1, "size": 2}
    script("attention").against_dense(report, "row", **sizes, seconds=0)
    measured = lines(capsys)
    assert measured["speedup"] == pytest.approx(
        measured["dense, forward + backward"] / measured["blocked, forward + backward"], rel=1e-3
    )
    script("attention").by_grid(report, "row", **sizes, seconds=0)
    assert set(lines(capsys)) == {"forward + backward", "a code", "temporary memory"}


class Falling(Stage):
    """The least that an update can be timed with."""

    name = "falling"
    run = SimpleNamespace(loop=LoopConfig(steps=1))
    optimizer = optax.with_extra_args_support(optax.sgd(0.1))

    def init(self, key):
        return {"kernel": jax.random.normal(key, (2,))}

    def loss(self, params, batch, key, step):
        return jnp.sum(params["kernel"] * batch), {}


def test_an_update_is_timed_again_and_again_though_it_consumes_its_state():
    assert script("train_step").step_time(Falling(), jnp.ones(2), seconds=0) > 0


def test_an_update_of_the_prior_gives_its_rate_and_share(report, capsys, monkeypatch):
    train_step = script("train_step")
    monkeypatch.setattr(train_step, "step_time", lambda stage, batch, *, seconds: 0.5)
    assert train_step.prior(report, "tiny", PRIOR, 2) == 4
    measured = lines(capsys)
    assert (measured["update"], measured["rate"]) == (500, 4)
    assert measured["linear share of peak"] < measured["share of peak"]


def test_an_update_of_the_dvae_gives_its_rate_and_share(report, capsys, monkeypatch):
    train_step = script("train_step")
    monkeypatch.setattr(train_step, "step_time", lambda stage, batch, *, seconds: 0.5)
    assert train_step.dvae(report, "tiny", DVAE, 8, 2) == 4
    assert set(lines(capsys)) == {"update", "rate", "share of peak"}


def test_stages_take_the_batches_that_they_are_timed_with(key):
    train_step = script("train_step")
    for stage, batch in (
        (train_step.prior_stage(PRIOR, 2), train_step.prior_batch(PRIOR, 2)),
        (train_step.dvae_stage(DVAE, 8, 2), train_step.dvae_batch(8, 2)),
    ):
        params = jax.eval_shape(stage.init, key)
        loss, _ = jax.eval_shape(stage.loss, params, batch, key, jnp.int32(0))
        assert loss.shape == ()


def test_tokenising_is_measured(report, capsys):
    script("tokenise").encode(report, "tiny", DVAE, 8, 2, seconds=0)
    assert set(lines(capsys)) == {"a batch", "rate", "share of peak"}


def test_every_form_of_a_product_means_the_same(report, capsys, key):
    products = script("products")
    kernels = jax.random.normal(key, (2, 16, 8))
    x = jax.random.normal(jax.random.fold_in(key, 1), (8, 3))
    for form, (shrink, multiply) in products.FORMS.items():
        weights = jax.tree.map(lambda part: part[0], shrink(kernels))
        chex.assert_trees_all_close(multiply(weights, x), kernels[0] @ x, atol=0.1)
        products.measure(report, "tiny", form, kernels, 3, seconds=0)
        assert set(lines(capsys)) == {"all kernels once", "float32 weights"}


def test_decoding_is_measured_against_both_bandwidths(report, capsys):
    script("decode").decode(
        report, "tiny", dataclasses.replace(PRIOR, depth=1), 4, captions=2, own=60.0
    )
    measured = lines(capsys)
    assert measured["share of bound"] == pytest.approx(
        2 * measured["share of bound without jax"], rel=1e-3
    )


def test_batches_of_codes_and_of_images_are_measured(tmp_path):
    data = script("data")
    config = dataclasses.replace(PRIOR, text_length=32)
    assert data.code_time(tmp_path, config, 2, count=2) > 0
    assert data.image_time(16, 2, count=2) > 0
    seconds, peak = data.example_cost(10**8, count=32)
    assert seconds > 0
    assert peak < 10 * 2**20


def test_a_start_is_measured_as_a_process(report, capsys):
    script("startup").starting(report, "nothing", [sys.executable, "-S", "-c", ""], 1.5, repeats=1)
    assert set(lines(capsys)) == {"seconds"}


def test_a_quick_run_leaves_out_slow_cases_and_only_keeps_a_beginning():
    options = script("measure").Options(quick=True, only="wide")
    quick = ("small sparse", "wide sparse")
    assert options.wanted("wide sparse", quick)
    assert not options.wanted("wide dense", quick)
    assert not options.wanted("small sparse", quick)


def test_a_peers_rates_come_by_item(tmp_path):
    harness = tmp_path / "bench_peers.py"
    harness.write_text(
        "import json, sys\n"
        "print(json.dumps({'what': sys.argv[2] + '/b1', 'unit': 'samples/s', 'value': 9.25}))\n"
        "print(json.dumps({'what': sys.argv[2] + '/b1', 'unit': 'MB peak RSS', 'value': 1530}))\n"
    )
    peer = (Path(sys.executable), tmp_path)
    assert script("measure").peer_rates(peer, "train/x", "samples/s") == {"train/x/b1": 9.25}
    with pytest.raises(RuntimeError, match="no images/s of train/x"):
        script("measure").peer_rates(peer, "train/x", "images/s")


def test_a_prior_multiplies_as_often_as_written_out():
    # 4 text and 4 image positions, width 8, two layers of 12 * 8 * 8 weights
    layers = 2 * (12 * 64) * 8
    heads = 3 * 8 * 20 + 4 * 8 * 6
    # text: each query meets the keys up to its own; an image query the 4 of the text; in a row
    # layer the block of both rows meets them and the row above, in the conv layer likewise
    text = 1 + 2 + 3 + 4
    image = 4 * (4 + (1 + 2) * 2)
    work = script("counting").prior_forward(PRIOR)
    assert work.linear == layers + heads
    assert work.attention == 2 * (2 * 8 * (text + image))
    assert work.total == work.linear + work.attention


def test_a_dense_layer_computes_five_eighths_of_its_logits():
    config = dataclasses.replace(PRIOR, attention="dense")  # 8 positions in runs of 2
    logits = 2 * (2 + 4 + 6 + 8)
    assert script("counting").attention_forward(config, "dense") == 2 * 8 * logits


def test_a_decoding_step_reads_as_many_bytes_as_written_out():
    # weights: two layers and the image head; caches of a row layer (ring of 3) and a conv layer
    # (ring of 4, all of the image) beside 4 text positions
    weights = 2 * (12 * 64) + 8 * 6
    read, flop = script("counting").decode_step(PRIOR, 6, captions=2)
    assert read == 4 * (weights + 2 * 8 * (2 * 2 * 4 + 6 * (3 + 4)))
    assert flop == 2 * 6 * (weights + 2 * 8 * (2 * 4 + 3 + 4))
    half, _ = script("counting").decode_step(PRIOR, 6, captions=2, kernel_bytes=2)
    assert half == (read + 4 * 8 * 6) / 2  # but for the head


def test_a_stage_reads_as_many_bytes_as_written_out():
    sizes = {"text_vocabulary": 20, "text_length": 4, "grid": 2, "codes": 6}
    config = ProgressiveConfig(width=8, depth=2, query_depth=1, heads=2, **sizes)
    read, flop = script("counting").stage(config, 6, cells=3, positions=7, kernel_bytes=2)
    kernels, cached = 2 * (12 * 64), 2 * 8 * 2 * 7
    assert read == 2 * (kernels + 6 * cached) + 4 * 8 * 6
    assert flop == 2 * 6 * 3 * (kernels + 8 * 6 + cached)


LOOP = """
%cut (p: f32[4,8,128], i: s32[]) -> f32[8,128] {
  %p = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,8,128}
  ROOT %b = f32[8,128]{1,0:T(8,128)} bitcast(%s)
}

%step (t: (s32[], bf16[33,64])) -> (s32[], bf16[33,64]) {
  %t = (s32[]{:T(128)S(6)}, bf16[33,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[33,64]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  ROOT %c = bf16[33,64]{1,0:T(8,128)(2,1)S(1)} copy(%x)
}

%more (t: (s32[], bf16[33,64])) -> pred[] {
  %t = (s32[]{:T(128)S(6)}, bf16[33,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[] constant(5)
  %k = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  ROOT %less = pred[]{:T(512)S(6)} compare(%k, %n), direction=LT
}

%body (t: (s32[], f32[4,8,128], f32[16,128])) -> f32[16,128] {
  %t = (s32[]{:T(128)S(6)}, f32[4,8,128]{2,1,0:T(8,128)}, f32[16,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %w = f32[4,8,128]{2,1,0:T(8,128)} get-tuple-element(%t), index=1
  %held = f32[16,128]{1,0:T(8,128)} get-tuple-element(%t), index=2
  %row = f32[8,128]{1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%cut
  %loop = (s32[]{:T(128)S(6)}, bf16[33,64]{1,0}) while(%t), condition=%more, body=%step
  ROOT %put = f32[16,128]{1,0:T(8,128)} dynamic-update-slice(%held, %row, %i, %i)
}

ENTRY %main (a: f32[16,128]) -> f32[16,128] {
  %a = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %while = f32[16,128]{1,0:T(8,128)} while(%a), condition=%more, body=%body
}
"""


def test_a_loop_moves_the_bytes_that_it_uses_of_arrays_in_memory():
    hbm = script("hbm")
    program, entry = hbm.read_program(LOOP)
    assert entry == "main"
    assert hbm.loop_bodies(program, entry) == ["body"]
    moved = {x.instruction.name: (x.read, x.written) for x in hbm.traffic(program, "body")}
    tile = 4 * 8 * 128
    # one of four matrices onto the chip; 40 rows of 128, padded, five times; one tile of two
    assert moved == {"row": (tile, 0), "c": (5 * 2 * 40 * 128, 0), "put": (0, tile)}


def test_a_dvae_convolves_as_often_as_written_out():
    config = DVAEConfig(width=4, groups=2, blocks_per_group=1, codes=5, code_width=3)
    counting = script("counting")
    encoder = 64 * 49 * 3 * 4 + 64 * (9 * (4 + 1 + 1) + 4)
    encoder += 16 * (9 * (4 * 2 + 2 * 2 + 2 * 2) + 2 * 8 + 4 * 8) + 16 * 8 * 5
    assert counting.encoder_forward(config, 8) == encoder
    decoder = 16 * 5 * 3 + 16 * (3 * 2 + 9 * (2 * 2 + 2 * 2 + 2 * 8) + 3 * 8)
    decoder += 64 * (8 * 1 + 9 * (1 + 1 + 4) + 8 * 4) + 64 * 4 * 6
    assert counting.decoder_forward(config, 8) == decoder


def test_the_accelerator_script_goes_on_with_what_is_missing(monkeypatch, tmp_path, capsys):
    accelerator = script("accelerator")
    out, asked = tmp_path / "found.jsonl", []

    def piece(name, broken=False):
        def measure():
            asked.append(name)
            if broken:
                raise MemoryError("too large")
            return {"ms": 2.0}

        return measure

    parts = {"first": piece("first"), "large": piece("large", broken=True), "last": piece("last")}
    monkeypatch.setattr(accelerator, "pieces", lambda options: parts)
    accelerator.main(accelerator.Options(out=out))
    with out.open("a") as file:
        file.write('\n{"piece": "cut sh')
    assert "large: MemoryError: too large" in capsys.readouterr().out
    parts["large"] = piece("large")
    accelerator.main(accelerator.Options(out=out))
    assert asked == ["first", "large", "last", "large"]
    found = accelerator.read(out)
    assert {name: numbers["ms"] for name, numbers in found.items()} == dict.fromkeys(parts, 2.0)
