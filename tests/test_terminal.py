import logging

import pytest
from rich.console import Console

from dalle_jax import terminal
from dalle_jax.data.sources import SourceError
from dalle_jax.errors import UserError
from dalle_jax.evaluate.votes import VotesError
from dalle_jax.generate.model_folder import ModelError
from dalle_jax.image.pixels import ImageError
from dalle_jax.terminal import bar, complaints, show_log_lines
from dalle_jax.text.bpe import TextError
from dalle_jax.train.checkpoint_folder import CheckpointError
from dalle_jax.train.metrics_buffer import NonFiniteError
from dalle_jax.weights.torch_file import WeightsError


def test_log_lines_go_to_the_terminal_once(capsys):
    show_log_lines()
    show_log_lines()
    logging.getLogger("dalle_jax.data").info("3 files skipped")
    logging.getLogger("dalle_jax.data").debug("not shown")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.endswith(" 3 files skipped\n")


def test_a_bar_counts_on_a_terminal_and_says_nothing_elsewhere(capsys, monkeypatch):
    with bar("Sampling") as progress:
        progress(1, 4)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "console", Console(stderr=True, force_terminal=True, width=99))
    with bar("Reading captions", of="records") as progress:
        progress(3, 4)
    shown = capsys.readouterr().err
    assert "Reading captions" in shown and "3/4" in shown and "records/s" in shown


@pytest.mark.parametrize(
    "kind",
    [
        UserError,
        CheckpointError,
        ModelError,
        NonFiniteError,
        ImageError,
        SourceError,
        TextError,
        VotesError,
        WeightsError,
    ],
)
def test_what_the_user_can_mend_ends_the_program_with_one_sentence(capsys, kind):
    with pytest.raises(SystemExit) as stopped, complaints("dalle"):
        raise kind("n is 0; give 1")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "dalle: n is 0; give 1\n"


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, RuntimeError])
def test_every_other_error_goes_on_with_its_traceback(capsys, kind):
    with pytest.raises(kind), complaints("dalle"):
        raise kind("all the input arrays must have matching shapes")
    assert capsys.readouterr().err == ""


def test_ctrl_c_ends_a_program_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as stopped, complaints("dalle"):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == ""
