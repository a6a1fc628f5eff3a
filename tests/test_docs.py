"""Commands of README and docs are understood by what they call, and links lead somewhere.

Nothing here trains or installs: a command is parsed by the parser that would run it, up to the
first thing it does. What runs is tested with the room it belongs to.
"""

import functools
import inspect
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tiny
import tyro
from tyro.extras import SubcommandApp

import dalle_jax
from dalle_jax import cli
from dalle_jax.serve.config import ServeConfig
from dalle_jax.serve.image_request import read_request

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRAPPERS = {"srun", "--kill-on-bad-exit=1"}  # what may stand before a command
NOT_RUN = {
    "tail": "of the system; the file's name is that of tests/train/test_log.py",
    "mkdir": "of the system",
}
WITHOUT_OPTIONS = {"experiments/overlap.py"}  # minutes long, with its numbers in docs/evaluate.md


def blocks(text):
    """Indented code of a page, as lists of lines, joined where a line ends in a backslash."""
    found, lines = [], []
    for line in [*text.splitlines(), "end"]:
        if line.startswith("    ") and line.strip():
            lines.append(line[4:])
        elif line.strip() and lines:
            found.append("\n".join(lines).replace("\\\n", " ").splitlines())
            lines = []
    return found


def is_command(line):
    words = line.split()
    known = ("dalle-jax", "python", "pip", "make", "curl", *NOT_RUN, *WRAPPERS)
    return any(Path(word).name in known for word in words[:2]) and "=" not in words[1:2]


def all_commands():
    found = {}
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            for line in block:
                if is_command(line):
                    found.setdefault(line.partition("  #")[0].strip(), page.name)
    return [pytest.param(line, id=f"{page}: {line[:60]}") for line, page in found.items()]


class Parsed(BaseException):  # not caught on its way
    """Ends a program where it would begin to work."""


@pytest.fixture(scope="module", autouse=True)
def _parse_alone():
    """Whatever tyro parses ends in `Parsed`."""
    real = tyro.cli

    def parse(target, **options):
        raise Parsed(real(_ending(target), **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", parse)
        for app in (cli._app, cli._data, cli._votes):
            for spec in app._subcommands.values():
                if not isinstance(spec.target, SubcommandApp):
                    patch.setattr(spec, "target", _ending(spec.target))
        patch.syspath_prepend(str(ROOT / "experiments" / "benchmarks"))
        yield


def _ending(target):
    """Of what tyro fills in, a function that does nothing but end, or a class as it is."""
    if not inspect.isfunction(target):
        return target

    @functools.wraps(target)
    def end(*args, **options):
        raise Parsed

    return end


def parse(words):
    """Raises `Parsed` if the words are a command that can run, else what its parser says."""
    program = Path(words[0]).name
    if program == "dalle-jax":
        cli.main(words[1:])
    script = ROOT / words[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[1:])
        patch.syspath_prepend(str(script.parent))
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("line", all_commands())
def test_command_is_understood(line):
    words = [word for word in shlex.split(line) if word not in WRAPPERS]
    words[0] = words[0].removeprefix("ExecStart=")
    while "=" in words[0]:
        del words[0]
    match Path(words[0]).name, *words[1:]:
        case "dalle-jax", *_:
            with pytest.raises(Parsed):
                parse(words)
        case "python", script if script in WITHOUT_OPTIONS:
            assert (ROOT / script).is_file()
        case "python", script, *_ if script.startswith("experiments/"):
            with pytest.raises(Parsed):
                parse(words)
        case "python", script, *_:  # tools of the tests themselves, minutes long
            assert (ROOT / script).is_file()
        case "pip", "install", name:
            assert set(re.findall(r"\w+", name)[1:]) <= extras() | {"jax"}
        case "make", target:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()
        case "curl", *_:
            body = json.loads(words[words.index("-d") + 1])
            assert read_request(body, ServeConfig())[0].prompt
        case program, *_:
            assert program in NOT_RUN


def mentions():
    """Commands and options between backticks, which are mostly not whole."""
    found = {}
    for page in PAGES:
        for text in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            if text.startswith(("dalle-jax ", "--")):
                found.setdefault(text, page.name)
    return found


HELP = {
    "dalle-jax": [[name] for name in cli._app._subcommands if name not in ("data", "votes")]
    + [["data", name] for name in cli._data._subcommands]
    + [["votes", name] for name in cli._votes._subcommands],
    "experiments/folder.py": [["dvae"], ["vqgan"], ["prior"], ["progressive"], ["clip"], ["all"]],
    "experiments/emoji.py": [["prior"]],
    "experiments/people.py": [["prior"]],
    "experiments/orders.py": [["train"], ["draw"]],
    "experiments/recipes.py": [["prepare"], ["measure"], ["train"], ["table"]],
    "experiments/codec_study.py": [["prepare"], ["train"], ["table"], ["sheet"]],
    "experiments/dalle_12b.py": [["plan"]],
    "experiments/powersgd.py": [[]],
    "experiments/benchmarks/decode.py": [[]],
}


ELSEWHERE = {
    "--preset": "read before tyro reads the rest (experiments/emoji.py)",
    "--file_format": "of TensorFlow Datasets",
    "--requeue": "of Slurm",
    "--signal": "of Slurm",
    "--singles": "the old name of another (docs/vocabulary.md)",
    "--share": "the old name of another (docs/vocabulary.md)",
}


def test_mentioned_commands_and_options_exist(capsys):
    helps = {}
    for program, ways in HELP.items():
        for way in ways:
            start = [program] if program == "dalle-jax" else ["python", program]
            with pytest.raises(SystemExit):
                parse([*start, *way, "--help"])
            helps[program, *way] = capsys.readouterr().out
    everything, unknown = "\n".join([*helps.values(), *ELSEWHERE]), []
    for text, page in mentions().items():
        program, *words = text.split() if text.startswith("dalle-jax") else ("", *text.split())
        known = everything
        if program and not words[0].startswith("--"):
            way = words[:2] if words[0] in ("data", "votes") else words[:1]
            known = helps.get((program, *way), "")
        options = re.findall(r"(?<!\S)--[\w.-]*\w", text)
        missing = [x for x in options if not re.search(rf"(?<!\S){x}(?![\w-])", known)]
        if not known or missing:
            unknown.append((page, text))
    assert not unknown, "\n".join(map(str, unknown))


def extras():
    text = (ROOT / "pyproject.toml").read_text()
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return {"dalle_jax", *re.findall(r"^(\w+) = ", table, re.MULTILINE)}


def test_an_unknown_option_is_noticed(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["dalle-jax", "generate", "red apple", "--temprature", "1"])
    assert stop.value.code == 2
    assert "--temperature" in capsys.readouterr().err


def test_the_python_of_generate_md_runs(monkeypatch):
    monkeypatch.setattr(dalle_jax, "load", lambda name: tiny.model(clip=tiny.clip()))
    text = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
    (block,) = (block for block in blocks(text) if "import dalle_jax" in block)
    names = {}
    exec("\n".join(block), names)
    assert names["images"].shape == (1, 4, tiny.PX, tiny.PX, 3)
    assert names["best"].images.shape[:2] == (1, 4)
    assert names["again"].shape == (4, tiny.PX, tiny.PX, 3)


def slug(heading):
    """The anchor that GitHub gives to a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@functools.cache
def anchors(page):
    text = page.read_text(encoding="utf-8")
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue  # tests ask nothing of the network
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
