"""What programs say to whoever started them: log lines, progress bars and complaints, on stderr."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dalle_jax.errors import UserError

# One console for bars and the log, so that a log line moves a bar down and not through it.
console = Console(stderr=True)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def say(line: str) -> None:
    """Writes a line with the time of day."""
    now = time.strftime("%H:%M:%S")
    console.print(f"{now} {line}", markup=False, highlight=False, soft_wrap=True)


def show_log_lines() -> None:
    """Sends log lines of dalle_jax to the terminal; for programs, to be called once at the start.

    Does nothing if the logger "dalle_jax" has a handler already. Its lines no longer reach the
    root logger: importing Orbax gives that one a handler, which would print them again.
    """
    logger = logging.getLogger("dalle_jax")
    if not logger.handlers:
        logger.addHandler(_ConsoleHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def be_quiet() -> None:
    """Says nothing but complaints from now on: of several processes one is enough to read."""
    console.quiet = True


@contextmanager
def bar(doing: str, *, of: str = "images") -> Iterator[Callable[[int, int], None]]:
    """Shows how far some work is; gives a function of what is done and of all there is to do.

    Args:
      doing: what is done, such as "Sampling".
      of: what is counted.
    """
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]:.2f}} {of}/s"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task("", total=None, rate=0.0)
        start = time.perf_counter()

        def update(done: int, total: int) -> None:
            rate = done / (time.perf_counter() - start)
            shown.update(task, completed=done, total=total, rate=rate)

        yield update


@contextmanager
def complaints(program: str) -> Iterator[None]:
    """Says what the user can mend in one sentence, and ends the program with exit status 2.

    Args:
      program: its name, which comes first.
    Raises:
      SystemExit: 2 in place of a UserError, 130 after Ctrl-C; all other errors go on, with their
        traceback.
    """
    try:
        yield
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
