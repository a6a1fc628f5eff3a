"""A lock on a folder, so that two runs never write the same files.

The system lets go of it when its process ends, however that ends. On a shared disk it holds between
machines where the disk has locks, as NFS does since version 4.

Source: ours.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dalle_jax.parallel.processes import choose_on_leader
from dalle_jax.train.checkpoint_folder import CheckpointError

log = logging.getLogger(__name__)

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is made if need be, for all processes of this run.

    Raises:
      CheckpointError: if another run holds it, or the folder cannot be written.
      RuntimeError: in the other processes then.
    """
    with contextlib.ExitStack() as stack:
        choose_on_leader(lambda: _take(folder, stack))
        yield


def _take(folder: Path, stack: contextlib.ExitStack) -> None:
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise CheckpointError(
            f"nothing can be saved in {folder}: {error.strerror}; make it a folder with room that "
            "this program may write, or choose another workdir"
        ) from error
    try:
        try:
            _lock(path, "r", stack)  # a disk with a file open to be written is never read-only
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            _lock(path, "r+", stack)  # NFS locks such files alone
    except BlockingIOError:
        raise CheckpointError(
            f"another run works in {folder} ({path.read_text() or 'unknown'}); wait for its end, "
            "stop it, or choose another workdir"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning(
            "the disk of %s has no locks (%s); see to it that no second run works there",
            folder,
            error.strerror,
        )
    else:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")


def _lock(path: Path, mode: str, stack: contextlib.ExitStack) -> None:
    fcntl.flock(stack.enter_context(path.open(mode)), fcntl.LOCK_EX | fcntl.LOCK_NB)
