"""From the start of a process: imports, help, and images of the shipped model.

    python experiments/benchmarks/startup.py [--quick] [--json]

Each measurement is a process of its own. Compiled programs go to a cache folder that is empty
before the first drawing.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro
from measure import Options, Report

PROGRAM = Path(sys.executable).with_name("dalle-jax")
IMPORTS = {"import dalle_jax": 1.5, "from dalle_jax import Model": 1.5}
DRAWINGS = {
    "generate 1 image": (["a red heart", "-n", "1"], 6.0),
    "generate 24 images": ([], None),
}
QUICK = (*IMPORTS, "dalle-jax --help", "generate 1 image")


def main(options: Options) -> None:
    """Runs all cases."""
    report = Report("startup", as_json=options.json)
    repeats = 3 if options.quick else 7
    for code, target in IMPORTS.items():
        if options.wanted(code, QUICK):
            starting(report, code, [sys.executable, "-c", code], target, repeats=repeats)
    if options.wanted("dalle-jax --help", QUICK):
        starting(report, "dalle-jax --help", [PROGRAM, "--help"], 1.5, repeats=repeats)
    for case, (arguments, target) in DRAWINGS.items():
        if options.wanted(case, QUICK):
            drawing(report, case, arguments, target)


def starting(report, case, command, target, *, repeats):
    """The fastest of several starts: others read files from a disk cache that is not full yet."""
    taken = min(seconds(command) for _ in range(repeats))
    report.add(case, "seconds", taken, "s", target)


def drawing(report, case, arguments, target):
    """The same images twice: the second time everything has been compiled."""
    with tempfile.TemporaryDirectory() as folder:
        cache = {"DALLE_JAX_CACHE": str(Path(folder) / "cache")}
        command = [PROGRAM, "generate", *arguments, "--out", Path(folder) / "sheet.png"]
        report.add(case, "first time", seconds(command, **cache), "s")
        report.add(case, "second time", seconds(command, **cache), "s", target)


def seconds(command, **environment):
    """From the start of a process to its end."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
