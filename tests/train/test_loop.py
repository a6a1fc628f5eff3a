import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dalle_jax.train import loop
from dalle_jax.train.checkpoint import CheckpointError, Checkpoints
from dalle_jax.train.log import read_metrics
from dalle_jax.train.loop import LoopConfig, train
from dalle_jax.train.metrics_buffer import NonFiniteError
from dalle_jax.train.stage import Stage


class Mlp(Stage):
    """Two layers; with dropout the keys of the steps matter too, but it compiles for longer."""

    name = "mlp"
    rules = (("*", PartitionSpec()),)
    optimizer = optax.with_extra_args_support(optax.adamw(optax.linear_schedule(1e-2, 0, 100)))

    def __init__(self, *, dropout=False, break_at=None, at_evaluation=None):
        self.dropout = dropout
        self.break_at = break_at
        self.at_evaluation = at_evaluation

    def init(self, key):
        key_in, key_out = jax.random.split(key)
        return {
            "in": jax.random.normal(key_in, (4, 8)),
            "out": jax.random.normal(key_out, (8,)),
        }

    def loss(self, params, batch, key, step):
        hidden = jnp.tanh(batch["x"] @ params["in"])
        if self.dropout:
            hidden = hidden * jax.random.bernoulli(key, 0.9, hidden.shape)
        loss = jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)
        if self.break_at is not None:
            loss = loss + jnp.where(step + 1 == self.break_at, jnp.nan, 0.0)
        return loss, {"hidden": jnp.mean(jnp.abs(hidden))}

    def evaluate(self, params):
        if self.at_evaluation is not None:
            self.at_evaluation()
        return {"mean": np.mean(params["out"])}

    def sheet(self, params):
        return np.zeros((2, 3, 3), np.uint8)


def data(batch_size=4):
    """Ten examples, shuffled anew each epoch, with noise drawn for each."""

    def example(i, rng):
        x = np.linspace(i, i + 1, 4, dtype=np.float32) + rng.normal(0, 0.1, 4).astype(np.float32)
        return {"x": x, "y": np.float32(i % 2)}

    dataset = grain.MapDataset.range(10).seed(1).shuffle().repeat(None).random_map(example)
    # The default reads 500 batches ahead, at seconds of a core for each run.
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(dataset.batch(batch_size).to_iter_dataset(read))


def config(steps, **changes):
    small = LoopConfig(steps=steps, log_every=2, save_every=3, evaluate_every=4, sheet_every=4)
    return dataclasses.replace(small, **changes)


def run(workdir, steps, *, stage=None, settings=None, iterator=None, may_change=(), **changes):
    iterator = iterator or data()
    state = train(
        stage or Mlp(),
        iterator,
        config=config(steps, **changes),
        workdir=workdir,
        settings=settings or {},
        may_change=may_change,
    )
    return state.replace(key=jax.random.key_data(state.key)), iterator


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_resumed_run_equals_unbroken_run(tmp_path, accumulation_steps):
    same = {"stage": Mlp(dropout=True), "accumulation_steps": accumulation_steps}
    unbroken, unbroken_data = run(tmp_path / "a", 10, **same)
    run(tmp_path / "b", 5, **same)
    resumed, resumed_data = run(tmp_path / "b", 10, seed=99, **same)
    chex.assert_trees_all_equal(resumed, unbroken)
    chex.assert_trees_all_equal(next(resumed_data), next(unbroken_data))
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab")
    last_a, last_b = ([e for e in entries if "loss" in e][-1] for entries in (a, b))
    assert last_a["last/loss"] == last_b["last/loss"]


def test_an_ema_on_the_host_is_that_of_the_devices_bit_for_bit(tmp_path, monkeypatch):
    make, kinds = loop.make_train_step, set()

    def looking(*args, **options):
        step = make(*args, **options)

        def call(state, batch):
            kinds.update(x.sharding.memory_kind for x in jax.tree.leaves(state.ema_params))
            return step(state, batch)

        return call

    monkeypatch.setattr(loop, "make_train_step", looking)
    on_devices, _ = run(tmp_path / "a", 10, ema_every=2, ema_decay=0.5)
    assert kinds == {"device"}
    kinds.clear()
    on_host = {"ema_every": 2, "ema_decay": 0.5, "ema_on_host": True}
    run(tmp_path / "b", 5, **on_host)
    resumed, _ = run(tmp_path / "b", 10, **on_host)
    assert kinds == {"pinned_host"}
    chex.assert_trees_all_equal(resumed, on_devices)
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in "ab")
    assert "eval/mean" in a and a["eval/mean"] == b["eval/mean"]


def test_a_resumed_run_draws_no_weights_and_begins_nothing(tmp_path):
    told = []

    class Telling(Mlp):
        def init(self, key):
            jax.debug.callback(lambda: told.append("init"))
            return super().init(key)

        def init_from_data(self, params):
            told.append("init_from_data")
            return {"in": np.asarray(params["in"]), "out": 2 * params["out"]}

    state, _ = run(tmp_path, 3, stage=Telling())
    jax.effects_barrier()
    assert told == ["init", "init_from_data"]
    resumed, _ = run(tmp_path, 3, stage=Telling())
    jax.effects_barrier()
    assert told == ["init", "init_from_data"]
    chex.assert_trees_all_equal(resumed, state)


def test_run_leaves_checkpoints_metrics_and_sheets(tmp_path):
    run(tmp_path, 7)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3, 6, 7]
    assert [p.name for p in sorted((tmp_path / "sheets").iterdir())] == [
        "mlp-000004.png",
        "mlp-000007.png",
    ]
    entries = read_metrics(tmp_path / "metrics.jsonl")
    training = [e for e in entries if "loss" in e]
    assert [e["step"] for e in training] == [2, 4, 6, 7]
    assert [e["step"] for e in entries if "eval/mean" in e] == [4, 7]
    assert {"stage", "time_s", "hidden", "grad_norm", "last/loss", "steps_per_s"} <= set(
        training[1]
    )
    assert all(e["stage"] == "mlp" for e in entries)


def test_logged_metrics_are_means_over_the_window(tmp_path):
    run(tmp_path / "each", 4, log_every=1)
    run(tmp_path / "four", 4, log_every=4)
    each = [e for e in read_metrics(tmp_path / "each" / "metrics.jsonl") if "loss" in e]
    (four,) = (e for e in read_metrics(tmp_path / "four" / "metrics.jsonl") if "loss" in e)
    np.testing.assert_allclose(four["loss"], np.mean([e["loss"] for e in each]), rtol=1e-6)
    assert four["last/loss"] == each[-1]["loss"]


def test_resume_drops_metrics_beyond_the_checkpoint(tmp_path):
    run(tmp_path, 4)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:  # as a run killed at step 6 before its save would leave it
        file.write('{"step": 6, "stage": "mlp", "time_s": 9.0, "loss": 1.0}\n{"step": 6, "st')
    run(tmp_path, 8)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert [s for s in steps if s == 6] == [6] and steps == sorted(steps)


def test_finished_run_returns_its_state_and_trains_no_further(tmp_path):
    first, _ = run(tmp_path, 3)
    again, _ = run(tmp_path, 3)
    chex.assert_trees_all_equal(first, again)


def test_non_finite_loss_stops_with_step_and_metric(tmp_path):
    message = "loss became nan at step 5; the last good checkpoint is step 3 in .*; give another"
    with pytest.raises(NonFiniteError, match=message):
        run(tmp_path, 20, stage=Mlp(break_at=5))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3]


def test_non_finite_loss_at_a_save_is_found_before_the_save(tmp_path):
    with pytest.raises(NonFiniteError, match="nan at step 3; no checkpoint was saved before; give"):
        run(tmp_path, 20, stage=Mlp(break_at=3), log_every=100)
    assert Checkpoints(tmp_path / "checkpoints").steps() == []


def test_changed_settings_stop_a_resume(tmp_path):
    run(tmp_path, 3, settings={"model": {"width": 8}, "note": "a"})
    changed = {"model": {"width": 8}, "note": "b"}
    with pytest.raises(CheckpointError, match="note was 'a', now 'b'"):
        run(tmp_path, 5, settings=changed)
    state, _ = run(tmp_path, 5, settings=changed, may_change=["note"])
    assert state.step == 5


def test_another_stage_does_not_go_on_in_this_folder(tmp_path):
    run(tmp_path, 3)
    stage = Mlp()
    stage.name = "other"
    with pytest.raises(CheckpointError, match="stage was 'mlp', now 'other'"):
        run(tmp_path, 5, stage=stage)


def test_a_second_run_in_one_workdir_is_refused_before_it_touches_anything(tmp_path):
    def second():
        with pytest.raises(CheckpointError, match="another run works in .*; wait for its end, st"):
            run(tmp_path, 3)

    run(tmp_path, 4, stage=Mlp(at_evaluation=second))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3, 4]


def test_data_that_ends_is_an_error(tmp_path):
    batch = {"x": np.ones((1, 4), np.float32), "y": np.ones(1, np.float32)}
    finite = iter(grain.MapDataset.range(2).map(lambda i: batch).to_iter_dataset())
    with pytest.raises(ValueError, match="the data ended after step 2 of 5; a training iterator"):
        run(tmp_path, 5, iterator=finite)


def test_config_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="log_every is 0, but must be at least 1"):
        LoopConfig(steps=3, log_every=0)
    with pytest.raises(ValueError, match=r"ema_decay is 1.0, but must lie in \[0, 1\)"):
        LoopConfig(steps=3, ema_decay=1.0)
    assert LoopConfig(steps=3, evaluate_every=None).evaluate_every is None


ENDLESS = """
import sys
sys.path.insert(0, {tests!r})
from test_loop import run
from dalle_jax.terminal import show_log_lines
show_log_lines()
run({workdir!r}, 10**6, save_every=10**6, log_every=1, evaluate_every=None, sheet_every=None)
"""


def test_sigterm_saves_and_a_restart_goes_on_as_if_unbroken(tmp_path):
    code = ENDLESS.format(tests=str(Path(__file__).parent), workdir=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300  # generous: busy machines start slowly
    while len(read_metrics(tmp_path / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    (step,) = Checkpoints(tmp_path / "checkpoints").steps()
    assert f"mlp saved step {step} and stops" in errors
    resumed, _ = run(tmp_path, step + 2)
    unbroken, _ = run(tmp_path / "unbroken", step + 2)
    chex.assert_trees_all_equal(resumed, unbroken)


def test_ctrl_c_during_an_evaluation_saves_the_next_step(tmp_path):
    stage = Mlp(at_evaluation=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, 20, stage=stage)
    assert stop.value.code == 130
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3, 5]  # evaluated after step 4


def test_signal_after_the_last_update_still_stops_the_program(tmp_path):
    stage = Mlp(at_evaluation=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        run(tmp_path, 2, stage=stage)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]


def test_second_ctrl_c_stops_at_once(tmp_path):
    # what a terminal's Python does, whatever ran in this process before
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def twice():
        ours = signal.getsignal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) == ours:  # two at once would count as one
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 20, stage=Mlp(at_evaluation=twice))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3]


def test_signal_handlers_are_given_back(tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    run(tmp_path, 1)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
