import dataclasses
import errno
import json
import logging
import os
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.parallel.mesh import MeshConfig, make_mesh
from dalle_jax.train import checkpoint_diff, manifest
from dalle_jax.train.checkpoint import CheckpointError, Checkpoints
from dalle_jax.train.state import TrainState

SETTINGS = {"model": {"width": 64, "kinds": ["row", "column"]}, "steps": 100}


def state_at(step):
    params = {"dense": {"w": jnp.full((4, 8), step, jnp.float32), "b": jnp.arange(8.0)}}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        ema_params=jax.tree.map(lambda x: x / 2, params),
        opt_state=optax.adamw(1e-3).init(params),
        key=jax.random.key(7),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    with Checkpoints(path) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state_at(step), {"next_index": step}, SETTINGS)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of three saved steps: 10, 20, 30."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def largest_file(folder):
    return max((f for f in folder.rglob("d/*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def key_data(state):
    return state.replace(key=jax.random.key_data(state.key))


def test_restored_state_equals_saved_state(folder):
    step, state, data, settings = Checkpoints(folder).restore(state_at(0))
    assert (step, data, settings) == (30, {"next_index": 30}, SETTINGS)
    chex.assert_trees_all_equal(key_data(state), key_data(state_at(30)))
    chex.assert_trees_all_equal_dtypes(key_data(state), key_data(state_at(30)))


def test_restored_arrays_lie_where_those_of_the_template_do(folder):
    """The step too: elsewhere, a resumed run compiled its update twice."""
    places = jax.tree.map(
        lambda _: NamedSharding(make_mesh(MeshConfig()), PartitionSpec()), state_at(0)
    )
    _, state, _, _ = Checkpoints(folder).restore(jax.device_put(state_at(0), places))
    for x, place in zip(*map(jax.tree.leaves, (state, places)), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)


def test_saved_state_is_not_touched_by_donation(tmp_path):
    overwrite = jax.jit(lambda s: s.replace(params=jax.tree.map(lambda x: x + 1, s.params)),
                        donate_argnums=0)  # fmt: skip
    state = state_at(5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {}, {})
        for _ in range(5):
            state = overwrite(state)
    _, restored, _, _ = Checkpoints(tmp_path).restore(state_at(0))
    chex.assert_trees_all_equal(restored.params, state_at(5).params)


def test_nothing_saved_gives_none(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(state_at(0)) is None


def test_unfinished_save_is_never_used_and_is_cleaned_up(folder):
    shutil.move(folder / "000030", folder / "tmp-000030")
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.restore(state_at(0))[0] == 20
    with checkpoints:
        checkpoints.save(25, state_at(25), {}, SETTINGS)
    assert sorted(p.name for p in folder.iterdir()) == ["000010", "000020", "000025"]


def test_unfinished_first_save_starts_afresh(folder):
    for step in ("000010", "000020"):
        shutil.rmtree(folder / step)
    shutil.move(folder / "000030", folder / "tmp-000030")
    assert Checkpoints(folder).restore(state_at(0)) is None


def damage_flip(path):
    flip_byte(largest_file(path / "params"))


def damage_truncate(path):
    file = largest_file(path / "optimizer")
    file.write_bytes(file.read_bytes()[:-3])


def damage_file(path):
    (path / "settings.json").unlink()


def damage_manifest(path):
    (path / "manifest.json").unlink()


def damage_manifest_text(path):
    (path / "manifest.json").write_text("{")


def damage_name(path):
    shutil.rmtree(path)
    shutil.copytree(path.parent / "000020", path)


def damage_all(path):
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    "damage, reason",
    [
        (damage_flip, r"params/.* has changed since it was written"),
        (damage_truncate, r"optimizer/.* has \d+ bytes instead of \d+"),
        (damage_file, "settings.json is missing"),
        (damage_manifest, "manifest.json is missing"),
        (damage_manifest_text, "manifest.json is unreadable"),
        (damage_name, "it was saved as step 20"),
        (damage_all, "manifest.json is missing"),
    ],
)
def test_damaged_step_falls_back_one_with_a_reason(folder, caplog, damage, reason):
    damage(folder / "000030")
    with caplog.at_level(logging.WARNING):
        step, state, data, _ = Checkpoints(folder).restore(state_at(0))
    assert (step, data) == (20, {"next_index": 20})
    assert state.params["dense"]["w"][0, 0] == 20
    (message,) = caplog.messages
    assert message.startswith("checkpoint of step 30 in ") and "\n" not in message
    assert re.search(reason, message)


def test_damage_to_any_file_is_noticed(folder):
    path = folder / "000030"
    assert manifest.damage(path, 30) is None
    for file in [f for f in path.rglob("*") if f.is_file() and f.stat().st_size]:
        whole = file.read_bytes()
        for place in range(0, len(whole), 29 if file.name == "manifest.json" else len(whole)):
            flipped = bytearray(whole)
            flipped[place] ^= 1
            file.write_bytes(flipped)
            assert manifest.damage(path, 30), (file, place)
        file.write_bytes(whole[:-1])
        assert manifest.damage(path, 30), file
        file.unlink()
        assert manifest.damage(path, 30), file
        file.write_bytes(whole)
    assert manifest.damage(path, 30) is None


def test_a_file_that_cannot_be_read_is_damage(folder, monkeypatch, caplog):
    def broken_disk(file):
        if "000030" in str(file):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return sha256(file)

    sha256 = manifest._sha256
    monkeypatch.setattr(manifest, "_sha256", broken_disk)
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(folder).restore(state_at(0))[0] == 20
    assert re.search("step 30 .* is not used: .* cannot be read .Input/output error", caplog.text)


def test_a_step_that_was_taken_away_leaves_the_one_before(folder):
    shutil.rmtree(folder / "000030")
    assert Checkpoints(folder).restore(state_at(0))[0] == 20


def test_only_damaged_steps_never_start_over_silently(folder):
    for path in folder.iterdir():
        damage_manifest(path)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(30, 20, 10; "):
        Checkpoints(folder).restore(state_at(0))


def test_a_step_saved_after_a_fall_back_replaces_the_damaged_one(folder):
    damage_flip(folder / "000030")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(25, state_at(25), {}, SETTINGS)
    assert checkpoints.steps() == [10, 20, 25]


@pytest.mark.parametrize("name", ["debug[1]", "a*", "what?"])
def test_names_that_orbax_takes_for_patterns_are_refused_at_the_start(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"in its name for a pattern; choose a workdir wi"):
        Checkpoints(tmp_path / name).prepare(state_at(0))
    assert not (tmp_path / name).exists()


# Orbax gives the failed read up while its other reads go on, and they find its event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_step_that_cannot_be_read_back_does_not_count(tmp_path, caplog):
    """As it is in a folder with [ in its name, where Orbax finds nothing to put together."""
    with Checkpoints(tmp_path / "a[1]") as checkpoints, caplog.at_level(logging.WARNING):
        checkpoints.save(1, state_at(1), {}, {})
        assert checkpoints.newest() is None
        checkpoints._failures.clear()
    assert "step 1 could not be saved" in caplog.text
    assert "it cannot be read back: ema_params/dense/b is absent in it" in caplog.text


def test_each_process_hashes_and_verifies_the_files_that_it_wrote(folder):
    path = folder / "000030"
    (path / "manifest.json").unlink()
    (path / "params" / "ocdbt.process_0").rename(path / "params" / "ocdbt.process_1")
    manifest.write(path, 30, index=1, count=2)
    manifest.write(path, 30, index=0, count=2)
    theirs = json.loads((path / "manifest-00001.json").read_text())["files"]
    ours = json.loads((path / "manifest.json").read_text())["files"]
    assert theirs and all(name.startswith("params/ocdbt.process_1/") for name in theirs)
    assert "manifest-00001.json" in ours and not set(ours) & set(theirs)
    flip_byte(largest_file(path / "params" / "ocdbt.process_1"))
    assert manifest.damage(path, 30, index=0, count=2) is None
    assert manifest.damage(path, 30, index=1, count=2).endswith("changed since it was written")
    assert manifest.damage(path, 30).endswith("changed since it was written")


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state_at(step), {}, {})
    assert checkpoints.steps() == [3, 4]
    with pytest.raises(ValueError, match="max_to_keep is 0, but must be at least 1"):
        Checkpoints(tmp_path, max_to_keep=0)


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 64
    gain: float = 1.5


@dataclasses.dataclass(frozen=True)
class Outer:
    model: Inner = dataclasses.field(default_factory=Inner)
    steps: int = 100
    kinds: tuple = ("row",)


def test_a_setting_that_a_checkpoint_lacks_has_its_default(folder):
    # SETTINGS, as saved, have neither model.gain nor kinds
    def restored(outer):
        settings, defaults = dataclasses.asdict(outer), checkpoint_diff.defaults(outer)
        return Checkpoints(folder).restore(state_at(0), settings=settings, defaults=defaults)

    assert restored(Outer())[0] == 30
    with pytest.raises(CheckpointError, match=r"settings: model.gain was 1.5, now 2.0; set"):
        restored(Outer(model=Inner(gain=2.0)))
    with pytest.raises(CheckpointError, match=r"kinds was \['row'\], now \['column'\]; set"):
        restored(Outer(kinds=("column",)))
    with pytest.raises(CheckpointError, match=r"model.width was 64, now 65; set"):
        restored(Outer(model=Inner(width=65)))  # the saved value counts, not a default


def test_changed_settings_are_named(folder):
    now = {"model": {"width": 128, "kinds": ("row", "column")}}
    with pytest.raises(CheckpointError, match=r"other settings: model.width was 64, now 128; set"):
        Checkpoints(folder).restore(state_at(0), settings=now)
    now["model"]["width"] = 64  # steps may differ, as nothing is said about it; tuples are lists
    assert Checkpoints(folder).restore(state_at(0), settings=now)[0] == 30


@pytest.mark.parametrize("part", ["dvae", "tokenizer"])
def test_another_dvae_or_tokenizer_is_named(tmp_path, part):
    fingerprints = {"dvae": "a5a7", "tokenizer": "2c39"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1), {}, {"fingerprints": fingerprints})
    now = {"fingerprints": fingerprints | {part: "beef"}}
    sentence = f"fingerprints.{part} was '{fingerprints[part]}', now 'beef'; set them back, or"
    with pytest.raises(CheckpointError, match=sentence):
        checkpoints.restore(state_at(0), settings=now)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"params": {"dense": {"w": jnp.zeros((4, 9)), "b": jnp.zeros(8)}}},
         r"params/dense/w is float32\[4, 8\] in it, float32\[4, 9\] here"),
        ({"opt_state": optax.sgd(1e-3).init({})},
         r"optimizer/0/count is int32\[\] in it, absent here"),
    ],
)  # fmt: skip
def test_another_model_or_optimizer_is_refused(folder, change, reason):
    with pytest.raises(CheckpointError, match=f"step 30 in .* does not fit this .*: {reason}; use"):
        Checkpoints(folder).restore(state_at(0).replace(**change))


def test_settings_that_json_cannot_hold_fail_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="not JSON"):
        checkpoints.save(1, state_at(1), {}, {"array": np.zeros(3)})


def test_manifest_lists_every_file_with_size_and_hash(folder):
    path = folder / "000010"
    files = json.loads((path / "manifest.json").read_text())["files"]
    on_disk = {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()}
    assert set(files) == on_disk - {"manifest.json"}
    assert files["data.json"]["size"] == len('{"next_index": 10}')
