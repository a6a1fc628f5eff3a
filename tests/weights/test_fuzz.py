"""A few hundred damaged and hostile files; `fuzz.py` reads as many as one likes."""

import importlib.util
from pathlib import Path


def test_damaged_files_are_refused_in_a_sentence_and_call_nothing():
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).parent / "fuzz.py")
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    ends = fuzz.run(300, seed=1)
    assert ends["refused"] > 200
    assert ends["read"] > 2  # some damage does not matter
