import errno
import os
import shutil
import tempfile

import numpy as np
import pytest
import tiny
from PIL import Image

from dalle_jax.cli import main
from dalle_jax.commands import compare_models, evaluate_model, generate_images, inspect_data
from dalle_jax.generate.model_folder import SHIPPED
from dalle_jax.image.pixels import decode, encode_png


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.model().save(path)
    return str(path)


@pytest.fixture
def dalle(capsys):
    """Runs the command line; gives its exit status, what it printed and what it complained of."""

    def run(*args):
        status = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


def test_generate_samples_a_sheet_and_says_where(dalle, folder, tmp_path):
    sheet = tmp_path / "new" / "sheet.png"
    args = ("red apple", "crying cat", "--model", folder, "-n", 2, "--seed", 3, "--out", sheet)
    status, said, _ = dalle("generate", *args)
    assert status == 0
    assert said.startswith("4 images of 16 px in ")
    assert said.endswith(f"s: {sheet}\n")
    first = decode(sheet)
    assert first.shape[1] > 2 * 8 * tiny.PX
    sheet.unlink()
    dalle("generate", *args)
    np.testing.assert_array_equal(decode(sheet), first)


def test_the_best_of_many_are_kept_with_their_scores(dalle, folder, tmp_path):
    args = ("generate", "red apple", "crying cat", "--model", folder, "--out", tmp_path / "a.png")
    tiny.clip().save(tmp_path / "clip")
    status, said, _ = dalle(*args, "-n", 3, "--keep", 2, "--clip", tmp_path / "clip")
    assert status == 0
    *scores, last = said.splitlines()
    assert [line.partition(":")[0] for line in scores] == ["red apple", "crying cat"]
    for line in scores:
        best, second = map(float, line.partition(":")[2].split())
        assert 1 >= best >= second >= -1
    assert last.startswith("6 images of 16 px, the best 2 of each caption kept, in ")
    status, _, complained = dalle(*args, "-n", 3, "--keep", 2)
    assert status == 2
    assert "has no CLIP to rank images with" in complained


def test_an_image_is_edited_and_samples_are_traced(dalle, tmp_path):
    folder = tmp_path / "both"
    tiny.model(**tiny.progressive_parts()).save(folder)
    original, mask = np.full((tiny.PX, tiny.PX, 3), 200, np.uint8), np.zeros((16, 16, 3), np.uint8)
    mask[:8] = 255
    for name, image in (("image.png", original), ("mask.png", mask)):
        (tmp_path / name).write_bytes(encode_png(image))
    args = ("edit", tmp_path / "image.png", "red apple", "--model", folder, "-n", 2)
    args += ("--out", tmp_path / "edit.png", "--image-folder", tmp_path / "singles")
    status, said, _ = dalle(*args, "--mask", tmp_path / "mask.png")
    assert status == 0
    assert said.startswith("2 images in ")
    single = decode(tmp_path / "singles" / "000-red-apple-001.png")
    np.testing.assert_array_equal(single[10:], original[10:])
    assert dalle(*args)[0] == 2

    args = ("generate", "red apple", "--model", folder, "-n", 1, "--out", tmp_path / "a.png")
    status, _, _ = dalle(*args, "--decoder", "progressive", "--trace", tmp_path / "steps.gif")
    assert status == 0
    with Image.open(tmp_path / "steps.gif") as gif:
        assert 1 < gif.n_frames <= 16
    status, _, complained = dalle(*args, "--trace", "steps.png")
    assert status == 2
    assert "--trace is steps.png; it is a GIF, so its name must end in .gif" in complained


def test_without_captions_the_first_twelve_of_the_list_are_sampled(dalle, folder, tmp_path):
    first_of_each = tmp_path / "singles"
    status, said, _ = dalle(
        *("generate", "--model", folder, "-n", 1, "--image-folder", first_of_each),
        *("--out", tmp_path / "sheet.png"),
    )
    assert status == 0
    assert said.startswith("12 images")
    names = sorted(path.name for path in first_of_each.iterdir())
    listed = (SHIPPED / "emoji" / "captions.txt").read_text().splitlines()[:12]
    assert names == [
        f"{row:03d}-{caption.lower().replace(' ', '-')}-000.png"
        for row, caption in enumerate(listed)
    ]
    assert decode(first_of_each / names[0]).shape == (tiny.PX, tiny.PX, 3)


@pytest.mark.parametrize(("model", "many"), [("emoji", 40), ("people", 24)])
def test_listed_captions_are_plain_and_all_different(model, many):
    captions = (SHIPPED / model / "captions.txt").read_text().splitlines()
    assert len(captions) == len(set(captions)) == many
    assert all(caption.strip() == caption != "" for caption in captions)


def test_image_prompt_is_read_from_a_file(dalle, folder, tmp_path):
    original = tmp_path / "alpha.png"
    Image.new("RGBA", (30, 40), (255, 0, 0, 9)).save(original)
    status, _, _ = dalle(
        *("generate", "red apple", "--model", folder, "-n", 1, "--out", tmp_path / "sheet.png"),
        *("--image-prompt", original, "--keep-rows", 2),
    )
    assert status == 0


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ([" "], "caption 1 of 1 is empty; describe an image"),
        (["-n", 0], "n is 0; at least 1 image per caption"),
        (["-n", 2, "--keep", 3], "keep is 3; it must be 1 to 2, the images per caption"),
        (["--clip", "none"], "--clip names the CLIP that ranks images; give --keep too"),
        (["--temperature", -1], "temperature is -1.0"),
        (["--top-k", 0], "top_k is 0"),
        (["--top-p", 1.5], "top_p is 1.5"),
        (["--seed", -1], "seed is -1; it must be a whole number from 0 to 4294967295"),
        (["--out", "sheet.jpg"], "--out is sheet.jpg; it is a PNG, so its name must end in"),
        (["--keep-rows", 2], "keep_rows is 2, but no image prompt was given"),
        (
            ["--image-prompt", "none.png", "--keep-rows", 2],
            "--image-prompt is none.png, which cannot be",
        ),
        (["--model", "emojy"], "'emojy' is neither a shipped model nor a folder; shipped models:"),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_sentence(
    dalle, folder, tmp_path, monkeypatch, args, complaint
):
    monkeypatch.chdir(tmp_path)
    captions = [] if args == [" "] else ["red apple"]
    status, said, complained = dalle("generate", *captions, "--model", folder, *args)
    assert status == 2
    assert said == ""
    assert complained.startswith("dalle-jax: ")
    assert complaint in complained
    assert complained.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["edit", "none.png", "red apple"],
        ["evaluate", "--inception", "none.png"],
        ["votes", "page", "emoji", "emoji", "--captions", "none.png"],
        ["votes", "count", "none.png", "none.png"],
    ],
)
def test_a_file_that_is_not_there_is_named_before_work_begins(dalle, command):
    status, _, complained = dalle(*command)
    assert status == 2
    assert "is none.png, which cannot be read: No such file or directory\n" in complained


@pytest.mark.parametrize(
    ("command", "option", "suffix"),
    [
        (["generate", "red apple"], "--out", ".png"),
        (["generate", "red apple"], "--trace", ".gif"),
        (["generate", "red apple"], "--image-folder", ""),
        (["edit", "image.png", "red apple"], "--out", ".png"),
        (["edit", "image.png", "red apple"], "--image-folder", ""),
        (["evaluate"], "--out", ""),
        (["data", "overlap", "a", "b"], "--remove-list", ".txt"),
        (["data", "overlap", "a", "b"], "--sheet", ".png"),
        (["votes", "page", "emoji", "emoji"], "--out", ".html"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_work_begins(
    dalle, tmp_path, monkeypatch, command, option, suffix
):
    monkeypatch.chdir(tmp_path)
    for module in (compare_models, evaluate_model, generate_images, inspect_data):
        monkeypatch.setattr(module, "prepare_process", lambda: pytest.fail("work began"))
    (tmp_path / "file").touch()
    for path in (f"file/new/out{suffix}", "x" * 250 + suffix):
        status, _, complained = dalle(*command, option, path)
        assert status == 2
        assert f"{option} is {path}, where nothing can be written (" in complained
    if suffix:
        (tmp_path / f"folder{suffix}").mkdir()
        status, _, complained = dalle(*command, option, f"folder{suffix}")
        assert status == 2
        assert "but that is a folder; name a file" in complained
    assert len(list(tmp_path.iterdir())) == 1 + bool(suffix)


def test_a_trace_too_large_for_its_format_is_refused_before_sampling(dalle, folder, tmp_path):
    args = ("generate", "red apple", "--model", folder, "-n", 8000)
    args += ("--out", tmp_path / "a.png", "--trace", tmp_path / "a.gif")
    status, _, complained = dalle(*args)
    assert status == 2
    assert "but a GIF at most 65535 a side; ask for fewer" in complained


def test_what_cannot_be_saved_in_its_place_is_saved_elsewhere(dalle, folder, tmp_path, monkeypatch):
    from dalle_jax.image import sheet

    def full(path, data):
        if path.is_relative_to(tmp_path / "full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    write = sheet._write
    monkeypatch.setattr(sheet, "_write", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    args = ("generate", "red apple", "--model", folder, "-n", 1, "--trace", tmp_path / "a.gif")
    out, first_of_each = tmp_path / "full" / "a.png", tmp_path / "full" / "singles"
    status, _, complained = dalle(*args, "--out", out, "--image-folder", first_of_each)
    assert status == 2
    assert f"{out} could not be written (No space left on device); it is" in complained
    assert decode(complained.split()[-2]).ndim == 3
    [single] = tmp_path.glob("dalle-jax-*/singles/*.png")
    assert decode(single).shape == (tiny.PX, tiny.PX, 3)
    assert (tmp_path / "a.gif").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "red apple"],
        ["evaluate"],
        ["data", "overlap", "a", "b"],
        ["votes", "page", "emoji", "emoji"],
    ],
)
def test_a_seed_that_is_none_is_refused_by_every_command(dalle, command):
    status, _, complained = dalle(*command, "--seed", -1)
    assert status == 2
    assert complained == (
        "dalle-jax: --seed is -1; it must be a whole number from 0 to 4294967295\n"
    )


def test_truncated_image_prompt_is_named(dalle, folder, tmp_path):
    cut = tmp_path / "cut.png"
    Image.new("RGB", (99, 99)).save(cut)
    cut.write_bytes(cut.read_bytes()[:80])
    status, _, complained = dalle(
        *("generate", "red apple", "--model", folder, "--image-prompt", cut, "--keep-rows", 1)
    )
    assert status == 2
    assert f"{cut}: damaged or truncated" in complained


def test_damaged_weights_are_named(dalle, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "prior.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    status, _, complained = dalle("generate", "red apple", "--model", broken)
    assert status == 2
    assert f"cannot read the weights {weights}: missing or damaged" in complained


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("--temprature", "--temperature"), ("--guidence", "--guidance"), ("--modle", "--model")],
)
def test_mistyped_option_says_what_was_meant(dalle, wrong, meant):
    status, _, complained = dalle("generate", "red apple", wrong, "1")
    assert status == 2
    assert "Perhaps you meant" in complained
    assert meant in complained


def test_help_explains_every_option(dalle):
    status, said, _ = dalle("generate", "--help")
    assert status == 0
    for words in ("Images per caption", "0 always", "above 0 and up to 1", "rows of codes"):
        assert words in " ".join(said.replace("│", " ").split())


def test_data_check_lists_what_is_wrong(dalle, tmp_path):
    Image.new("RGB", (99, 99), "red").save(tmp_path / "red.png")
    (tmp_path / "red.txt").write_text("a red square\n")
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "dot.png")
    status, said, _ = dalle("data", "check", tmp_path)
    assert status == 0
    assert "2 images, 1 captions, 1 images to train on" in said
    assert "1 are tiny (short side below 64 px):\n  dot.png: 9x9" in said
    assert "1 have no caption:\n  dot.png" in said


def test_data_check_of_a_folder_without_images_is_an_error(dalle, tmp_path):
    status, _, complained = dalle("data", "check", tmp_path)
    assert status == 2
    assert complained.startswith("dalle-jax: ")
    assert str(tmp_path) in complained


def test_evaluate_hands_its_options_on(dalle, folder, tmp_path, monkeypatch):
    from dalle_jax.evaluate import features, report
    from dalle_jax.evaluate.evaluation_config import quick_config

    asked = {}

    def evaluate(model, suite, **options):
        asked.update(options, model=model.name, captions=suite.captions)
        rows = [{"images": "sampled", "FD X": 1.23456}]
        return [report.Section(key="distances", title="", rows=rows)]

    monkeypatch.setattr(report, "evaluate", evaluate)
    monkeypatch.setattr(features, "efficientnet_network", lambda: "network")
    Image.new("RGB", (99, 99), "red").save(tmp_path / "red.png")
    (tmp_path / "red.txt").write_text("a red square\n")
    status, said, _ = dalle(
        *("evaluate", "--model", folder, "--suite", "folder", "--data", tmp_path, "--quick"),
        *("--num-captions", 7, "--guidance", 2, "--studies", "blur", "--out", tmp_path / "report"),
    )
    assert status == 0
    assert said.startswith("images sampled, FD X 1.235\nmeasured in ")
    assert (asked["model"], asked["captions"]) == ("tiny", ("a red square",))
    assert asked["config"].captions == 7
    assert asked["config"].rerank_samples == quick_config().rerank_samples
    assert asked["sampling"].guidance == 2.0
    assert (asked["networks"], asked["chosen"], asked["judge"]) == (["network"], ("blur",), None)


def test_data_overlap_writes_what_to_leave_out(dalle, tmp_path, monkeypatch):
    from dalle_jax.evaluate import features

    class Network:
        def __call__(self, images):
            return images[:, ::50, ::50].reshape(len(images), -1).astype(np.float32), None

    monkeypatch.setattr(features, "efficientnet_network", Network)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    names = [os.fsdecode(f"{i}.png".encode("latin-1")) for i in ("0", "1", "é", "3")]
    for i, name in enumerate(names):  # one is no UTF-8
        image = Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8))
        image.save(tmp_path / "a" / name, "PNG")
        if i == 2:
            image.save(tmp_path / "b" / "same.png")
    args = (
        "--threshold",
        0.9,
        "--remove-list",
        tmp_path / "out.txt",
        "--sheet",
        tmp_path / "s.png",
    )
    status, said, _ = dalle("data", "overlap", tmp_path / "a", tmp_path / "b", *args)
    assert status == 0
    assert said.startswith("1 of 1 images (100.0 %) are nearly in the other 4")
    assert (tmp_path / "out.txt").read_bytes() == b"\xe9.png\n"
    assert decode(tmp_path / "s.png").ndim == 3


def test_data_overlap_looks_at_its_outputs_before_it_works(dalle, tmp_path):
    status, _, complained = dalle(
        *("data", "overlap", tmp_path / "a", tmp_path / "b", "--remove-list", tmp_path)
    )
    assert status == 2
    assert f"--remove-list is {tmp_path}, but that is a folder; name a file" in complained


def test_votes_page_and_count_belong_together(dalle, folder, tmp_path):
    (tmp_path / "captions.txt").write_text("red apple\n")
    out = tmp_path / "page.html"
    status, said, _ = dalle(
        *("votes", "page", folder, folder, "--captions", tmp_path / "captions.txt", "--out", out)
    )
    assert status == 0
    assert said == f"1 pairs: {out}; keep {tmp_path / 'page.key.json'} to yourself\n"
    status, _, complained = dalle("votes", "count", tmp_path / "page.key.json", out)
    assert status == 2
    assert "page.html holds no votes nor a key to them" in complained
