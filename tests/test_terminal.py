import logging

import pytest
from rich.console import Console

from dalle_jax import terminal
from dalle_jax.terminal import bar, complaints, show_log_lines


def test_log_lines_go_to_the_terminal_once(capsys):
    show_log_lines()
    show_log_lines()
    logging.getLogger("dalle_jax.data").info("3 files skipped")
    logging.getLogger("dalle_jax.data").debug("not shown")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.endswith(" 3 files skipped\n")


def test_a_bar_counts_on_a_terminal_and_says_nothing_elsewhere(capsys, monkeypatch):
    with bar("Drawing") as progress:
        progress(1, 4)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "console", Console(stderr=True, force_terminal=True, width=99))
    with bar("Reading captions", of="records") as progress:
        progress(3, 4)
    shown = capsys.readouterr().err
    assert "Reading captions" in shown and "3/4" in shown and "records/s" in shown


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("n is 0"), "dalle: n is 0\n"),
        (FileNotFoundError(2, "No such file", "x.png"), "dalle: x.png: No such file\n"),
        (OSError("record 3 is damaged"), "dalle: record 3 is damaged\n"),
        (LookupError("nothing there"), "dalle: nothing there\n"),
    ],
)
def test_what_the_user_can_mend_ends_the_program_with_one_sentence(capsys, error, said):
    with pytest.raises(SystemExit) as stopped, complaints("dalle", LookupError):
        raise error
    assert stopped.value.code == 2
    assert capsys.readouterr().err == said


def test_a_mistake_of_ours_is_no_complaint():
    with pytest.raises(TypeError), complaints("dalle"):
        raise TypeError
