"""What the experiment scripts keep between two starts of one command, and what they refuse."""

import dataclasses
import json

from dalle_jax.train import differences
from dalle_jax.train.clip import ClipRun
from dalle_jax.train.dvae import DVAERun
from dalle_jax.train.experiment import MAY_CHANGE, _settings
from dalle_jax.train.prior import PriorRun
from dalle_jax.train.vqgan import VQGANRun


def names(settings, beginning=""):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from names(value, f"{beginning}{name}.")
        else:
            yield beginning + name


def changed(settings, name):
    first, _, rest = name.partition(".")
    new = changed(settings[first], rest) if rest else "something else"
    return settings | {first: new}


def test_a_run_goes_on_with_these_settings_changed_and_no_others():
    allowed = set()
    for run in (DVAERun(), VQGANRun(), PriorRun(), ClipRun()):
        saved = json.loads(json.dumps(_settings(run)))
        for name in names(saved):
            now = differences.without(changed(saved, name), MAY_CHANGE)
            if differences.of_settings(saved, now):
                (said,) = differences.of_settings(saved, now)
                assert said.startswith(f"{name} was ")
            else:
                allowed.add(name)
    lengths = {"steps", "log_every", "save_every", "evaluate_every", "sheet_every", "keep"}
    free = {"seed", "mesh.data", "mesh.fsdp", "mesh.tensor"}
    assert allowed == {f"loop.{name}" for name in lengths | free} | {
        "run.remat",
        "run.scan_layers",
        "run.micro_batch",
    }


def test_settings_left_out_stay_in_the_original():
    settings = dataclasses.asdict(PriorRun())
    assert (
        "steps" not in differences.without(settings, ["loop.steps", "absent", "loop.x.y"])["loop"]
    )
    assert settings["loop"]["steps"] == 430_000
