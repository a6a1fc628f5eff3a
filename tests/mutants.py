"""Breaks the code in one place at a time and sees whether a test notices; not part of `make test`.

    PYTHONPATH=. .venv/bin/python tests/mutants.py [--only NAME ...] [--list]

Every mutant of mutations.py is made in a temporary copy of the tree, and the tests that should
notice are run there. It is killed if they fail, and survives if they pass. Results are kept in
build/mutants.json, and one that was killed is run again only if its file, its tests or itself
changed. Exits with 1 if a mutant survives, or what it replaces does not stand exactly once in its
file.
"""

import argparse
import ast
import hashlib
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import pytest
from jaxtyping import install_import_hook
from mutations import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build" / "mutants.json"
COPIED = ("dalle_jax", "tests", "experiments", "pyproject.toml")


def main() -> int:
    """Runs the mutants that are asked for; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants alone, anew")
    parser.add_argument(
        "--list", action="store_true", help="print a table of what is known; run nothing"
    )
    options = parser.parse_args()
    unknown = set(options.only or ()) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.list:
        print("| mutant | in | noticed by |\n| --- | --- | --- |")
        for mutant in MUTANTS:
            known = results.get(mutant.name, {"status": "not run", "said": ""})
            who = f"`{known['said']}`" if known["status"] == "killed" else known["status"]
            print(f"| {mutant.name} | {mutant.file} | {who} |")
    else:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            _run_all(Path(folder), options.only, results)
    return _report(results)


def _run_all(copy: Path, only: list[str] | None, results: dict) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "pretrained")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "dalle_jax" / "pretrained").symlink_to(ROOT / "dalle_jax" / "pretrained")
    _import_everything(copy)
    for mutant in MUTANTS:
        before = results.get(mutant.name, {})
        known = before.get("status") == "killed" and before["digest"] == _digest(copy, mutant)
        if mutant.name in only if only else not known:
            start = time.monotonic()
            status, said = _tried(copy, mutant)
            seconds = round(time.monotonic() - start)
            results[mutant.name] = {
                "digest": _digest(copy, mutant),
                "status": status,
                "seconds": seconds,
                "said": said,
            }
            print(f"{mutant.name:32} {status:10} {seconds:4} s  {said}", flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1))


def _import_everything(copy: Path) -> None:
    """Imports all there is once; each mutant's tests run in a fork of this process."""
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    # this tree's own modules are not to be found, those of the copy are
    own = (ROOT, ROOT / "tests")  # not .venv, which lies below the first
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path).resolve() not in own)]
    runpy.run_path(str(copy / "tests" / "conftest.py"))  # how JAX is set up for tests
    install_import_hook("dalle_jax", "beartype.beartype")
    for name in ("chex", "hypothesis", *_imports(copy)):
        importlib.import_module(name)


def _imports(copy: Path) -> dict[str, set[str]]:
    """Every module of the package, and those of the package that it imports."""
    found = {}
    for file in (copy / "dalle_jax").rglob("*.py"):
        parts = file.relative_to(copy).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        imports = found[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imports |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                imports |= {alias.name for alias in node.names}
    return found


def _forget(copy: Path, file: str) -> None:
    """Drops a module and all that import it, so that they are imported again."""
    imports = _imports(copy)
    stale, before = {"dalle_jax." + file.removesuffix(".py").replace("/", ".")}, 0
    while before != len(stale):
        before = len(stale)
        stale |= {name for name, of in imports.items() if of & stale}
    for name in stale:
        sys.modules.pop(name, None)
        parent, _, attribute = name.rpartition(".")
        if parent in sys.modules and hasattr(sys.modules[parent], attribute):
            delattr(sys.modules[parent], attribute)


def _tried(copy: Path, mutant: Mutant) -> tuple[str, str]:
    """Whether the mutant is killed, and the first test that noticed it."""
    file = copy / "dalle_jax" / mutant.file
    text = file.read_text(encoding="utf-8")
    if (count := text.count(mutant.old)) != 1:
        return "misplaced", f"{mutant.old!r} stands {count} times in {mutant.file}"
    try:
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        _date_anew(file)
        path, _, expression = mutant.tests.partition(" -k ")
        arguments = [f"tests/{path}", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
        arguments += ["-k", expression.replace("-", " and ")] if expression else []
        # types are checked already, by the hook of `_import_everything`
        in_fork = ["-o", "addopts=--import-mode=importlib --strict-markers"]
        in_fork += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status, output = _pytest(copy, mutant.file, arguments + in_fork)
        if status not in (0, 1):  # beartype remembers classes of the modules before
            command = [sys.executable, "-m", "pytest", *arguments]
            again = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
            status, output = again.returncode, again.stdout
    finally:
        file.write_text(text, encoding="utf-8")
        _date_anew(file)
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if status == 1:
        return "killed", failed[0].split(" - ")[0].partition("::")[2]
    if status == 0:
        return "survives", mutant.tests
    return "broken", f"pytest ended with {status}: {output[-200:]!r}"


def _pytest(copy: Path, file: str, arguments: list[str]) -> tuple[int, str]:
    """Exit status and output of pytest in a fork."""
    with tempfile.TemporaryFile() as output:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX has no threads yet
            child = os.fork()
        if not child:
            status = 70
            try:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                _forget(copy, file)
                status = int(pytest.main(arguments))
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc(file=sys.stdout)
                sys.stdout.flush()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode()


def _date_anew(file: Path) -> None:
    """Gives the file a date of its own: compiled modules are known by seconds and size."""
    _date_anew.now = max(getattr(_date_anew, "now", 0), int(time.time())) + 2
    os.utime(file, (_date_anew.now,) * 2)


def _digest(copy: Path, mutant: Mutant) -> str:
    files = [
        ROOT / "dalle_jax" / mutant.file,
        ROOT / "tests" / mutant.tests.partition("::")[0].split()[0],
    ]
    content = repr(mutant).encode() + b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()[:16]


def _report(results: dict) -> int:
    statuses = [results.get(mutant.name, {}).get("status", "not run") for mutant in MUTANTS]
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    for mutant, status in zip(MUTANTS, statuses, strict=True):
        if status != "killed":
            print(f"  {mutant.name}: {status}. {results.get(mutant.name, {}).get('said', '')}")
    return int(statuses.count("killed") < len(statuses))


if __name__ == "__main__":
    sys.exit(main())
