"""What the experiment scripts keep between two starts of one command, and what they refuse."""

import dataclasses
import json

from dalle_jax.text.bpe import Tokenizer
from dalle_jax.train import checkpoint_diff, run_settings
from dalle_jax.train.clip_stage import ClipRun
from dalle_jax.train.dvae_stage import DVAERun
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.model_card import model_card, stage_summary
from dalle_jax.train.prior_stage import PriorRun
from dalle_jax.train.run_settings import MAY_CHANGE
from dalle_jax.train.run_tokenizer import run_tokenizer
from dalle_jax.train.vqgan_stage import VQGANRun


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
        saved = json.loads(json.dumps(run_settings.settings(run)))
        for name in names(saved):
            now = checkpoint_diff.without(changed(saved, name), MAY_CHANGE)
            if checkpoint_diff.setting_differences(saved, now, {}):
                (said,) = checkpoint_diff.setting_differences(saved, now, {})
                assert said.startswith(f"{name} was ")
            else:
                allowed.add(name)
    lengths = {"steps", "log_every", "save_every", "evaluate_every", "sheet_every", "max_to_keep"}
    free = {"seed", "ema_on_host", "mesh.data", "mesh.fsdp", "mesh.tensor"}
    assert allowed == {f"loop.{name}" for name in lengths | free} | {
        "run.remat",
        "run.scan_layers",
        "run.micro_batch",
    }


def test_settings_left_out_stay_in_the_original():
    settings = dataclasses.asdict(PriorRun())
    assert (
        "steps"
        not in checkpoint_diff.without(settings, ["loop.steps", "absent", "loop.x.y"])["loop"]
    )
    assert settings["loop"]["steps"] == 430_000


class Captions:
    """Images that are never looked at."""

    def __init__(self, *captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        return {"id": str(index), "image": b"", "captions": [self.captions[index]]}


def test_a_tokenizer_is_learned_once_and_again_for_other_captions(tmp_path, monkeypatch):
    def learned(*captions, vocabulary=290):
        return run_tokenizer(Captions(*captions), vocabulary=vocabulary, folder=tmp_path)

    first = learned("red apple", "blue sky")
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "train", None)
        assert learned("red apple", "blue sky").fingerprint == first.fingerprint
    assert learned("red apple", "green leaf").fingerprint != first.fingerprint
    assert learned("red apple", "blue sky").fingerprint == first.fingerprint
    (tmp_path / "tokenizer.json").unlink()  # as if stopped before it was written
    assert learned("red apple", "blue sky").fingerprint == first.fingerprint
    assert (tmp_path / "tokenizer.json").exists()


def test_the_card_counts_updates_done_and_not_those_asked_for(tmp_path):
    run = PriorRun(loop=LoopConfig(steps=5))
    assert stage_summary("prior", run, 20, tmp_path).startswith(
        "- prior: 20 updates of 1024 examples"
    )


def test_a_card_names_short_terms_and_points_to_long_ones():
    short, long = (model_card("a", [], attribution="", license=x) for x in ("MIT", "MIT\n\nFree."))
    assert "Terms of the weights: MIT." in short
    assert "Terms of the weights: see LICENSE." in long and "Free" not in long
