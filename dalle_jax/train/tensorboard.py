"""Metrics for TensorBoard, by the package tensorboardX, which knows its format without TensorFlow.

Source: ours.
"""

import socket
import struct
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar


class TensorBoard:
    """Writes a new events file below a folder, which is open only while it is written.

    tensorboardX's own writer keeps it open, in a thread that dies of a full disk, and whoever waits
    for that thread then waits for ever.

    Args:
      folder: of the files, made if need be.
      step: updates done; TensorBoard forgets what earlier files say of later ones.
    Raises:
      OSError: if it cannot be written.
    """

    def __init__(self, folder: Path, *, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{step}"
        self._path = folder / name
        begin = SessionLog(status=SessionLog.START)
        self._append(Event(file_version="brain.Event:2"), Event(step=step + 1, session_log=begin))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of a step."""
        summaries = [scalar(name, value) for name, value in metrics.items()]
        self._append(*(Event(step=step, summary=summary) for summary in summaries))

    def _append(self, *events: Event) -> None:
        with self._path.open("ab") as file:
            for event in events:
                event.wall_time = time.time()
                file.write(_record(event.SerializeToString()))


def _record(data: bytes) -> bytes:
    """Frames the bytes of an event as a TFRecord."""
    length = struct.pack("<Q", len(data))
    checks = (struct.pack("<I", masked_crc32c(x)) for x in (length, data))
    return length + next(checks) + data + next(checks)
