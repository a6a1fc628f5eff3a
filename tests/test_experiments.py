"""The experiment scripts end to end, through their command line, on the debug sizes."""

import dataclasses
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saved import ema_params

import dalle_jax
from dalle_jax.errors import UserError
from dalle_jax.generate import tensor_file
from dalle_jax.image.pixels import encode_png
from dalle_jax.parallel.mesh import MeshConfig
from dalle_jax.parallel.powersgd import PowerSGDConfig
from dalle_jax.train.clip_stage import ClipRun
from dalle_jax.train.dvae_stage import DVAERun
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorRun
from dalle_jax.train.vqgan_stage import VQGANRun

SCRIPTS = Path(__file__).parent.parent / "experiments"


def run(script, *args, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "debug"
    with pytest.MonkeyPatch.context() as patch:
        run("debug", "all", "--workdir", folder, monkeypatch=patch)
    return folder


@pytest.mark.slow
def test_all_stages_leave_a_model_that_draws(workdir):
    model = dalle_jax.load(workdir / "model")
    images = model.generate(["a large red circle"], n=2, seed=1)
    assert images.shape == (1, 2, 16, 16, 3)
    card = (workdir / "model" / "README.md").read_text()
    assert "Coloured shapes" in card
    assert "- dvae: 20 updates of 8 examples" in card
    assert "- prior: 20 updates of 8 examples" in card
    assert "image_nats 3." in card
    assert (
        "- clip: 20 updates of 16 examples"
        in (workdir / "model" / "clip" / "README.md").read_text()
    )
    ranked = model.rank("a large red circle", n=4, seed=1, keep=2)
    assert ranked.scores.shape == (1, 2)
    with Image.open(workdir / "sheet.png") as sheet:
        assert sheet.width > 100


@pytest.mark.slow
def test_each_stage_logs_and_draws_while_it_trains(workdir):
    for stage in ("dvae", "prior"):
        lines = metrics(workdir / stage)
        assert lines[-1]["step"] == 20
        assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
        assert (workdir / stage / "sheets" / f"{stage}-000020.png").exists()
    measured = [line for line in lines if "eval/image_nats" in line]
    assert [line["step"] for line in measured] == [10, 20]


@pytest.mark.slow
def test_the_prior_learns_more_when_the_same_command_asks_for_more_steps(workdir, monkeypatch):
    more = ("--steps", 25, "--evaluate-every", "None", "--sheet-every", "None")
    run("debug", "prior", "--workdir", workdir, *more, monkeypatch=monkeypatch)
    lines = metrics(workdir / "prior")
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [5, 10, 15, 20, 25]


@pytest.mark.slow
def test_clip_measures_true_and_reconstructed_images(workdir):
    lines = metrics(workdir / "clip")
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert 0 <= lines[-1]["eval/reconstructed_text_to_image_5"] <= 1
    assert 0 <= lines[-1]["eval/image_to_text_1"] <= 1


@pytest.mark.slow
def test_a_progressive_prior_learns_and_joins_the_model(workdir, monkeypatch):
    run("debug", "progressive", "--workdir", workdir, monkeypatch=monkeypatch)
    lines = metrics(workdir / "progressive")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert 0 <= lines[-1]["eval/repaired"] <= 1
    model = dalle_jax.load(workdir / "model")
    assert list(model.priors) == ["prior", "progressive"]
    # finished: asked again, it finds its own end, though the model now has both priors
    run("debug", "progressive", "--workdir", workdir, monkeypatch=monkeypatch)
    assert metrics(workdir / "progressive")[-1] == lines[-1]


@pytest.mark.slow
def test_a_prior_goes_on_from_that_of_another_model(workdir, tmp_path, monkeypatch, capsys):
    last = ("--steps", 1, "--evaluate-every", "None", "--sheet-every", "None")
    other = ("--codec", workdir / "model", *last)
    run("debug", "prior", "--workdir", tmp_path / "a", *other, monkeypatch=monkeypatch)
    run(
        "debug",
        "prior",
        "--workdir",
        tmp_path / "b",
        *other,
        "--continued",
        monkeypatch=monkeypatch,
    )
    folders = (workdir, tmp_path / "a", tmp_path / "b")
    reached, fresh, continued = (
        [line["loss"] for line in metrics(folder / "prior") if "loss" in line][-1]
        for folder in folders
    )
    assert continued < fresh - 0.2 and continued < reached + 0.2
    tokenizers = [dalle_jax.load(x / "model").tokenizer for x in (workdir, tmp_path / "b")]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint
    has_one = ("--codec", tmp_path / "a" / "model")
    for name, change in (("prior", ("--model.mlp-ratio", 2)), ("progressive", has_one)):
        where = ("--workdir", tmp_path / "c", *other, "--continued", *change)
        with pytest.raises(SystemExit):
            run("debug", name, *where, monkeypatch=monkeypatch)
    said = " ".join(capsys.readouterr().err.split())
    assert "wants the sizes of the prior of 'debug', but --model has mlp_ratio 2 (there 4)" in said
    assert "wants to begin with a progressive prior, but the model 'debug' has prior; name" in said


@pytest.mark.slow
def test_a_prior_joins_those_of_another_model(workdir, tmp_path, monkeypatch, capsys):
    few = ("--steps", 1, "--evaluate-every", "None", "--sheet-every", "None")
    model = ("--codec", workdir / "model", "--workdir", tmp_path, "--keep-tokenizer", *few)
    sizes = ("--model.heads", 1, "--model.text-vocabulary", 300)  # the tokenizer's size wins
    run("debug", "progressive", *model, *sizes, monkeypatch=monkeypatch)
    old, new = (dalle_jax.load(folder / "model") for folder in (workdir, tmp_path))
    assert new.fingerprints["tokenizer"] == old.fingerprints["tokenizer"]
    assert new.fingerprints["prior"] == old.fingerprints["prior"]
    assert new.priors["progressive"][0].heads == 1
    assert new.generate(["a large red circle"]).shape == (1, 1, 16, 16, 3)

    has_none = ("--codec", workdir / "dvae" / "model")
    with pytest.raises(SystemExit):
        run("debug", "prior", *model, *has_none, monkeypatch=monkeypatch)
    assert "that model has no prior; name another" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_vqgan_makes_the_codes_in_place_of_the_dvae(tmp_path, monkeypatch):
    few = ("--steps", 2, "--evaluate-every", "None", "--sheet-every", "None")
    run("debug", "vqgan", "--workdir", tmp_path, *few, monkeypatch=monkeypatch)
    codec = ("--codec", "vqgan")
    dense = ("--model.attention", "dense")  # one kind of layer compiles faster
    run("debug", "prior", "--workdir", tmp_path, *codec, *dense, *few, monkeypatch=monkeypatch)
    model = dalle_jax.load(tmp_path / "model")
    assert model.kind == "vqgan"
    assert model.fingerprints.keys() == {"vqgan", "prior", "tokenizer"}
    assert "- vqgan: 2 updates of 8 examples" in model.card
    # what does not measure or draw while it trains encodes and draws nothing for it
    assert not (tmp_path / "sheet.png").exists()
    assert [path.name for path in (tmp_path / "prior" / "codes").iterdir()] == ["train"]


# dalle_12b.py at toy size; all that is not named here is its own: no evaluation, no sheets, groups
# of 8 devices, bfloat16. One kind of layer compiles in two thirds of the time.
TOY = {
    "dvae": {"model.width": 8, "model.groups": 3, "model.blocks-per-group": 1, "model.codes": 32}
    | {"px": 16, "batch-size": 8},
    "prior": {"model.width": 32, "model.heads": 2, "model.depth": 4, "model.attention": "dense"}
    | {"model.text-vocabulary": 300, "model.text-length": 16, "model.grid": 4, "model.codes": 32}
    | {"batch-size": 8},
    "clip": {"model.px": 16, "model.patch": 8, "batch-size": 8, "model.text-vocabulary": 300}
    | {"model.image-width": 16, "model.image-depth": 1, "model.image-heads": 2}
    | {"model.text-width": 16, "model.text-depth": 1, "model.text-heads": 2}
    | {"model.text-length": 16, "model.features": 16},
}


@pytest.mark.slow
def test_the_papers_run_goes_from_images_to_a_model_in_two_processes(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"noise of the kind {i}")
    options = [
        f"--{stage}.{name}={value}"
        for stage, sizes in TOY.items()
        for name, value in (sizes | {"steps": 2}).items()
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(SCRIPTS.parent)}
    command = [sys.executable, SCRIPTS / "dalle_12b.py", "all", "--data", images]
    command += ["--workdir", tmp_path / "run", "--processes.coordinator-address", address]
    members = [
        subprocess.Popen(
            [*command, "--processes.num-processes=2", f"--processes.process-id={index}", *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    told = [member.communicate(timeout=900)[0] for member in members]
    assert [member.returncode for member in members] == [0, 0], "\n".join(told)
    model = dalle_jax.load(tmp_path / "run" / "model")
    assert "- prior: 2 updates of 8 examples" in model.card and model.clip is not None
    checkpoints = tmp_path / "run" / "prior" / "checkpoints"
    stored = {
        name: np.asarray(x)
        for name, x in tensor_file.flatten_params(model.priors["prior"][1]).items()
    }
    for name, tensor in tensor_file.to_tensors(ema_params(checkpoints)).items():
        np.testing.assert_array_equal(stored[name], tensor.astype(np.float32), err_msg=name)
    assert not (tmp_path / "run" / "prior" / "codes").exists()  # nothing to measure, new crops


def test_a_contrastive_loss_is_not_accumulated(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(
            "debug",
            "clip",
            "--workdir",
            tmp_path,
            "--accumulation-steps",
            2,
            monkeypatch=monkeypatch,
        )
    assert stop.value.code == 2
    assert "a contrastive loss compares all of a batch" in " ".join(capsys.readouterr().err.split())


def test_a_seed_below_0_is_refused_by_its_name(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run("debug", "dvae", "--workdir", tmp_path, "--seed", -1, monkeypatch=monkeypatch)
    assert stop.value.code == 2
    assert "seed is -1, but must lie in 0..4294967295" in capsys.readouterr().err


@pytest.mark.slow
def test_another_model_size_is_refused_by_the_old_workdir(workdir, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run("debug", "prior", "--workdir", workdir, "--model.width", 64, monkeypatch=monkeypatch)
    assert stop.value.code == 2
    assert "width" in capsys.readouterr().err


def test_a_prior_that_does_not_fit_the_dvae_is_refused_before_training(
    tmp_path, monkeypatch, capsys
):
    args = ["all", "--workdir", tmp_path / "run", "--dvae.px", 32]
    with pytest.raises(SystemExit) as stop:
        run("debug", *args, monkeypatch=monkeypatch)
    assert stop.value.code == 2
    assert "model.grid is 4, but the dVAE makes 8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_cannot_spell_is_refused_before_training(tmp_path, monkeypatch, capsys):
    for stage in ("prior", "clip"):
        small = f"--{stage}.model.text-vocabulary=100"
        with pytest.raises(SystemExit, match="2"):
            run("debug", "all", "--workdir", tmp_path, small, monkeypatch=monkeypatch)
        assert f"{stage}: model.text_vocabulary is 100, but must be at l" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("script", "left"), [("folder", 10), ("dalle_12b", 9)])
def test_the_papers_filters_are_on_in_its_run_alone(script, left, tmp_path, monkeypatch):
    for number in range(10):
        image = encode_png(np.full((8, 8, 3), number, np.uint8))
        (tmp_path / f"{number}.png").write_bytes(image)
        (tmp_path / f"{number}.txt").write_text("a red apple" if number else "apple")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = runpy.run_path(str(SCRIPTS / f"{script}.py"))
    data = names.get("PaperOptions", names["FolderOptions"])(data=tmp_path).open(64)
    assert len(data.train) + len(data.validation) == left
    assert data.captions == ["a red apple"]


def test_emoji_with_skin_tones_can_be_left_out_in_part(monkeypatch):
    names = runpy.run_path(str(SCRIPTS / "emoji.py"))
    captions = ["red apple"] * 50 + ["cook with dark skin tone"] * 100
    records = [{"captions": [caption], "style": "twemoji"} for caption in captions]
    opened = names["EmojiOptions"].open.__globals__
    monkeypatch.setitem(opened, "emoji_source", lambda *_, **options: records)

    def images(**options):
        return len(names["EmojiOptions"](**options).open(96).train)

    assert (images(), images(toned=1.0), images(toned=0.0)) == (150, 150, 50)
    assert 60 < images(toned=0.25) < 90
    with pytest.raises(UserError, match="toned is 25, but is a share"):
        images(toned=25)


def test_a_mistyped_option_says_what_was_meant(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run("debug", "dvae", "--workdir", tmp_path, "--stpes", 3, monkeypatch=monkeypatch)
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["debug", "emoji", "people", "folder", "dalle_12b"])
def test_help_names_and_explains_every_option(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "90")  # one column
    with pytest.raises(SystemExit) as stop:
        run(script, "all", "--help", monkeypatch=monkeypatch)
    assert stop.value.code == 0
    said = explained(capsys.readouterr().out)
    for stage, cls in {
        "dvae": DVAERun,
        "vqgan": VQGANRun,
        "prior": PriorRun,
        "clip": ClipRun,
    }.items():
        expected = options(cls, stage)
        assert expected <= said.keys()
    assert {"--workdir", "--codec", "--processes.num-processes"} <= said.keys()
    assert [option for option, text in said.items() if not re.search("[a-z]{3}", text)] == []


@pytest.mark.parametrize(
    ("preset", "defaults"),
    [((), {"--model.width": "192", "--batch-size": "8", "--steps": "9000"}),
     (("--preset", "gpu"), {"--model.width": "256", "--batch-size": "32", "--steps": "7000"})],
)  # fmt: skip
def test_a_preset_sets_the_sizes_of_the_emoji_experiment(preset, defaults, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit):
        run("emoji", *preset, "progressive", "--help", monkeypatch=monkeypatch)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for option, value in defaults.items():
        assert re.search(rf"{option} \S+ .*?\(default: (\S+)\)", text)[1] == value


def options(cls, prefix):
    """The options of a dataclass of settings; those of the loop have no prefix of their own."""
    found = set()
    for field in dataclasses.fields(cls):
        inner = {"model": cls.__annotations__.get("model"), "loop": LoopConfig}.get(field.name)
        inner = {"mesh": MeshConfig, "powersgd": PowerSGDConfig}.get(field.name, inner)
        name = prefix if field.name == "loop" else f"{prefix}.{field.name.replace('_', '-')}"
        found |= options(inner, name) if inner else {f"--{name}"}
    return found


def explained(text):
    """What a help text says of each option, without its default."""
    found, option = {}, None
    for line in (line.strip("│| ") for line in text.splitlines()):
        if re.match("--[a-z]", line):
            option, *rest = re.split(r"\s{2,}", line, maxsplit=1)
            option = option.split()[0].rstrip(",")
            found[option] = " ".join(rest)
        elif option and line.strip("-"):
            found[option] += " " + line
        else:
            option = None
    return {
        option: re.sub(r"\((default: .*|required)\)$", "", said) for option, said in found.items()
    }
