"""A run on someone's own images: its plan is counted right, kept, and carried out."""

import json

import jax
import numpy as np
import optax
import pytest
import stages as tiny_stages
import tiny
from jax.sharding import PartitionSpec
from PIL import Image

import dalle_jax
from dalle_jax.cli import main
from dalle_jax.data.own_images import Padded
from dalle_jax.data.shapes import ShapesSource
from dalle_jax.data.sources import FolderSource
from dalle_jax.errors import UserError
from dalle_jax.planner import forecast, own_run, recipe
from dalle_jax.planner.forecast import StageForecast, forecast_stage
from dalle_jax.planner.own_run import PLAN, make_plan, steps_in
from dalle_jax.planner.plan_text import describe, duration
from dalle_jax.train.data_options import FolderOptions
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.stage import Stage


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    source = ShapesSource("train", px=24)
    for i in range(30):
        (folder / f"{i:02d}.png").write_bytes(source[i]["image"])
        (folder / f"{i:02d}.txt").write_text(source[i]["captions"][0])
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A model to go on from."""
    folder = tmp_path_factory.mktemp("models") / "begun"
    card = "# begun\n\n- dvae: 9 updates\n  of 8 images\n\n## Data and terms\n\nFruit by Ann.\n"
    tiny.model(**tiny.progressive_parts(), card=card, license="CC BY 4.0").save(folder)
    return folder


STAGE = {"parameters": 1000, "state_bytes": 4000}


def forecasts():
    times = {"vqgan": (10.0, 1.0, 2.0), "progressive": (20.0, 0.5, 4.0), "clip": (5.0, 2.0, 0.0)}
    names = ("compile_s", "update_s", "evaluation_s")
    return {
        name: StageForecast(**STAGE, **dict(zip(names, three, strict=True)))
        for name, three in times.items()
    }


def test_seconds_are_those_of_compiling_updates_and_evaluations():
    run = recipe.choose_recipe(746, 111).codec  # 1,500 updates, 6 evaluations
    stage = forecasts()["vqgan"]
    assert stage.seconds(run) == 10 + 1500 * 1.0 + 6 * 2.0
    assert stage.disk_bytes(run) == 3 * 4000 + 4 * 1000


def test_a_time_takes_the_same_share_of_each_stages_steps_and_no_more_than_all():
    chosen = recipe.choose_recipe(746, 111)
    stages = forecasts()
    runs = dict(chosen.stages())
    whole = sum(stages[name].seconds(run) for name, run in runs.items())
    steps = {name: run.loop.steps for name, run in runs.items()}
    assert steps_in(2 * whole, chosen, stages) == steps
    half = steps_in(whole / 2, chosen, stages)
    took = chosen.with_steps(half)
    assert sum(stages[n].seconds(r) for n, r in took.stages()) == pytest.approx(whole / 2, rel=0.02)
    with pytest.raises(UserError, match="--minutes is 1, but .* 200 updates of each stage take 13"):
        steps_in(60.0, chosen, stages)


def test_a_plan_is_kept_with_its_steps_and_made_anew_for_other_options(
    images, begun, tmp_path, monkeypatch
):
    asked = []

    def timed(run, *, held_out):
        asked.append(held_out)
        return forecasts()["progressive"]

    monkeypatch.setattr(own_run, "forecast_stage", timed)
    monkeypatch.setattr(own_run, "_reconstructed", lambda *_: 17.0)
    options, model = FolderOptions(data=images), dalle_jax.load(begun)
    first = make_plan(options, workdir=tmp_path, model=model, minutes=2.5)
    again = make_plan(options, workdir=tmp_path, model=model, minutes=2.5)
    assert (again, asked) == (first, [1])
    assert first.images == 29
    steps = json.loads((tmp_path / PLAN).read_text())["steps"]
    assert first.recipe.prior.loop.steps == steps["progressive"]
    other = make_plan(options, workdir=tmp_path, model=model, minutes=3.0)
    assert len(asked) == 2
    assert other.recipe.prior.loop.steps > first.recipe.prior.loop.steps


def test_shapes_are_those_that_training_sees(tmp_path):
    for number, size in enumerate(((40, 40), (60, 40), (61, 40), (20, 100))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("black")
    source = FolderSource(tmp_path)
    assert own_run._shapes(source) == (40, 0.5)
    assert own_run._shapes(Padded(source)) == (60, 0.0)


class Line(Stage):
    """Two numbers, which compile in no time."""

    name = "prior"
    rules = (("*", PartitionSpec()),)
    optimizer = optax.with_extra_args_support(optax.adam(0.1))

    def init(self, key):
        return {"a": jax.random.normal(key, ()), "b": jax.numpy.zeros(())}

    def loss(self, params, batch, key, step):
        return jax.numpy.mean((params["a"] * batch["x"] + params["b"]) ** 2), {}


def test_a_few_updates_of_a_stage_are_timed_and_its_state_is_counted(monkeypatch):
    monkeypatch.setattr(forecast, "_stage", lambda run: Line())
    monkeypatch.setattr(forecast, "random_batch", lambda run: {"x": np.ones(4, np.float32)})
    stage = forecast_stage(tiny_stages.RUNS["prior"], held_out=24)
    assert stage.parameters == 2
    numbers = 2 * 4  # weights, average, two moments
    assert stage.state_bytes == 4 * numbers + 4 + 4 + 8  # two counters, and a key
    assert 0 < stage.update_s < stage.compile_s
    assert stage.evaluation_s == pytest.approx(24 * stage.update_s / 3 / 4)  # four in a batch


@pytest.mark.parametrize("name", ["vqgan", "prior", "progressive", "clip"])
def test_a_batch_drawn_at_random_looks_like_one_of_training(name):
    run = tiny_stages.RUNS[name]
    wanted, drawn = tiny_stages.batch(run), forecast.random_batch(run)
    assert {k: (x.shape, x.dtype) for k, x in drawn.items()} == {
        k: (x.shape, x.dtype) for k, x in wanted.items()
    }


@pytest.mark.slow
def test_a_run_goes_on_from_a_model_and_keeps_codec_tokenizer_and_terms(
    images, begun, tmp_path, monkeypatch, capsys
):
    short = LoopConfig(steps=5, evaluate_every=5, sheet_every=5, ema_decay=0.5)
    monkeypatch.setattr(recipe, "_loop", lambda steps: short)
    monkeypatch.setattr(own_run, "forecast_stage", lambda *_, **__: forecasts()["progressive"])
    workdir = tmp_path / "mine"
    command = ["train", str(images), "--workdir", str(workdir), "--init-from", str(begun)]
    main([*command, "--plan-only"])
    said = capsys.readouterr().out
    assert "Images: 29 to train on and 1 held out, seen as squares of about 24 px" in said
    assert "its codec (16 px in 4 x 4 codes of 12) and tokenizer are kept" in said
    assert "reconstructs held-out images at" in said and (workdir / "reconstructions.png").exists()
    assert not (workdir / "model").exists()
    main(command)
    assert "Next: dalle-jax generate" in capsys.readouterr().out
    before, after = dalle_jax.load(begun), dalle_jax.load(workdir / "model")
    assert list(after.priors) == ["progressive"]
    for part in ("dvae", "tokenizer"):
        assert after.fingerprints[part] == before.fingerprints[part]
    old, new = (jax.tree.leaves(model.priors["progressive"][1]) for model in (before, after))
    moved = [float(np.abs(x - y).max()) for x, y in zip(old, new, strict=True)]
    assert 0 < max(moved) < 0.1  # a few updates of it, not of other weights
    assert "images of the folder" not in after.card
    assert "go on from those of the model tiny, whose card says:\n\n> Fruit by Ann." in after.card
    assert "- dvae: 9 updates\n  of 8 images\n- progressive: 5 updates" in after.card
    assert after.name == "mine"
    assert after.license == "CC BY 4.0"
    with Image.open(workdir / "sheet.png") as sheet:
        assert sheet.width > 16

    with pytest.raises(SystemExit, match="2"):  # another model would give other weights
        tiny.model(**tiny.progressive_parts() | {"progressive_params": _moved()}).save(
            tmp_path / "other"
        )
        main([*command[:-1], str(tmp_path / "other")])
    assert "init_from was" in capsys.readouterr().err


def _moved():
    return jax.tree.map(lambda x: x + 0.1, tiny.progressive_parts()["progressive_params"])


def plan(images, *, model=None, **changes):
    chosen = recipe.choose_recipe(images, 111, model=model)
    stages = {name: forecasts()[name] for name, _ in chosen.stages()}
    fields = {
        "recipe": chosen,
        "images": images,
        "held_out": 5,
        "side": 111,
        "oblong": 0.0,
        "cut": 0.0,
    }
    fields |= {"stages": stages, "psnr": None, "memory": 2**30}
    return own_run.Plan(**fields | changes)


def test_a_prior_that_got_worse_on_held_out_images_is_told_of(tmp_path):
    def after(*losses):
        lines = [{"step": 100 * i, "eval/loss": x} for i, x in enumerate(losses, 1)]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 999, "loss": 0.1}])
        (tmp_path / "metrics.jsonl").write_text(text)
        return own_run.overfit(tmp_path / "metrics.jsonl")

    assert after(4.5, 4.4, 4.41) == after(4.5, 4.4) == after() == ""
    assert after(4.5, 4.4, 5.8).startswith(
        "The loss on held-out images was lowest, 4.4, after 200 updates, and is now 5.8:"
    )


def test_the_plan_says_sizes_times_and_what_to_expect():
    said = describe(plan(746, cut=0.03))
    assert "VQ-GAN, 64 px in 8 x 8 codes of 512" in said
    assert "1,500 updates of 8 images, each image 16 times; about 25 min" in said
    assert "Memory: 1.0 GiB" in said
    assert "3% have more than the 63 tokens that the prior reads" in said
    assert "--init-from" not in said and "--pad" not in said and "of 1,409 by one" in said
    assert "Shapes: 30% are more than 1.5 times as long" in describe(plan(746, oblong=0.3))
    short = plan(746).recipe.with_steps({"vqgan": 400, "progressive": 400, "clip": 200})
    assert "the prior sees each image 4 times, where" in describe(plan(746, recipe=short))
    assert describe(plan(150)).count("Better: --init-from") == 1
    model = tiny.model(**tiny.progressive_parts())
    said = describe(plan(150, model=model, psnr=17.71), model)
    assert "reconstructs held-out images at 17.7 dB (reconstructions.png in the workdir)" in said
    assert "Expect: colours and shapes of your images as its codec draws them." in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (59.0, "59 s"), (119.0, "2 min"), (3600 * 3.5, "3 h 30 min")],
)
def test_durations_are_rough(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--minutes", "0"), "--minutes is 0.0, but has to be more than 0"),
        (("--px", "20"), "--px is 20, but has to be a multiple of 8 and at least 32"),
        (("--init-from", "emojis"), "'emojis' is neither a shipped model nor a folder"),
    ],
)
def test_what_cannot_be_used_is_said_in_words(options, said, images, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(images), "--workdir", str(tmp_path / "run"), *options])
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
