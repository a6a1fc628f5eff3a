"""Training checkpoints, complete or absent, and verified before use.

A step is a folder `000500/` with one Orbax item each for params, ema_params, optimizer and rng, the
data position and the settings as JSON, and manifests with the size and sha256 of every file (Orbax
reads back a flipped byte without complaint). All of it is written under a temporary name, read
back, and renamed last, so a folder under a step's name was complete once. Each process writes and
verifies its part of the arrays, process 0 the rest; all of them see the same disk.

Source: ours.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from dalle_jax.errors import UserError
from dalle_jax.parallel.processes import is_leader, processes_where
from dalle_jax.train import checkpoint_diff, checkpoint_folder, manifest
from dalle_jax.train.checkpoint_folder import CheckpointError, failure_reason
from dalle_jax.train.state import TrainState

log = logging.getLogger(__name__)

_UNFINISHED = "tmp-"
_FAILED = "failed-"  # an empty file: the save has failed in a process
_TIMEOUT_S = 1200.0  # for the files of other processes; Orbax waits as long
# Failed saves in a row that end a run. One must not cost a night of training, as the disk may have
# room again by the next; but a run that never saves is lost in the end.
_MAX_FAILURES = 3

# Orbax shows a failure as one traceback for each of its threads; `_note_failure` logs it once.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread" not in record.getMessage())


class Checkpoints:
    """The saved steps of one run. It saves in the background; `wait` or `close` waits for that.

    A save that fails is logged at once and leaves older steps as they are; the next one tries
    again.

    Args:
      folder: holds one folder per step; made by the first save.
      max_to_keep: newest steps to keep, at least 1.
    """

    def __init__(self, folder: str | Path, max_to_keep: int = 3):
        if max_to_keep < 1:
            raise UserError(f"max_to_keep is {max_to_keep}, but must be at least 1")
        self.folder = Path(folder).absolute()
        self._max_to_keep = max_to_keep
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None
        # Step of a save that other processes may not have finished, and whether it failed here.
        self._pending: int | None = None
        self._failed_here = False
        self._failures: list[CheckpointError] = []  # since the last save that succeeded

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        else:  # raise what ended the run, not a failed save before it
            self._worker.shutdown()

    def close(self) -> None:
        """Waits for the last save, as `wait` does, and ends the background thread."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def prepare(self, state: PyTree) -> None:
        """Checks, before anything is compiled, that such states can be saved at all.

        Warns if the disk has too little room for all steps to keep.

        Args:
          state: the arrays of a `TrainState`, or their shapes.
        Raises:
          CheckpointError: if the folder cannot be written, or has a name that Orbax cannot read.
        """
        if found := sorted(set("*?[") & set(str(self.folder))):
            raise CheckpointError(
                f"nothing can be saved in {self.folder}: Orbax takes the {' and '.join(found)} in "
                "its name for a pattern; choose a workdir without *, ? and ["
            )
        try:
            self._try_to_write()
        except OSError as error:
            raise CheckpointError(
                f"nothing can be saved in {self.folder}: {failure_reason(error)}; make it a folder "
                "with room that this program may write, or choose another workdir"
            ) from error
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        # One more than is kept, since an old step goes when the new one is complete.
        missing = max(self._max_to_keep + 1 - len(self.steps()), 1) * size
        free = shutil.disk_usage(self.folder).free
        if missing > free and is_leader():
            log.warning(
                "checkpoints of %.1f MB may not fit on the disk of %s: %d are kept, one more while "
                "saving, and %.1f MB are free; make room there, or keep fewer",
                *(size / 1e6, self.folder, self._max_to_keep, free / 1e6),
            )

    def _try_to_write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trial = self.folder / f".trial-{jax.process_index()}"
        try:
            trial.write_text("test")
        finally:
            trial.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises `CheckpointError` once saving has failed too often; does not wait.

        Of several processes all raise at the same step: after the save that follows.
        """
        if len(self._failures) >= _MAX_FAILURES and (
            self._pending is None or jax.process_count() == 1
        ):
            raise self._failures[-1]

    def wait(self) -> None:
        """Waits until the last save is on disk; raises `CheckpointError` if it failed."""
        self._finish_pending()
        if self._failures:
            raise self._failures[-1]

    def newest(self) -> int | None:
        """Waits for the last save and gives the newest step on disk; None for none."""
        self._finish_pending()
        return max(self.steps(), default=None)

    def _finish_pending(self) -> None:
        """Waits for the last save; if it failed in one process, it failed in all."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()
        step, self._pending = self._pending, None
        if step is not None:
            others = processes_where(self._failed_here)
            if others and not self._failed_here:
                self._note_failure(
                    step, CheckpointError(f"process {others[0]} could not save its part")
                )
            if not others:
                self._failures = []

    def steps(self) -> list[int]:
        """The steps on disk; see `checkpoint_folder.steps`."""
        return checkpoint_folder.steps(self.folder)

    def save(self, step: int, state: TrainState, data_state: dict, settings: dict) -> None:
        """Saves a step; returns when the state may be overwritten, before the files are complete.

        Args:
          step: steps done; this step and later ones are replaced, which exist only if the run was
            restored from before a damaged step.
          state: from `state.to_checkpoint`.
          data_state: position of the data iterator, JSON-able.
          settings: of the run, JSON-able; `restore` compares them.
        Raises:
          CheckpointError: if three saves in a row have failed, this one included.
        """
        self._finish_pending()
        self.check()
        # To JSON now: a value that it cannot hold fails here, and later changes do no harm.
        texts = {"data.json": json.dumps(data_state), "settings.json": json.dumps(settings)}
        unfinished, items = self.folder / f"{_UNFINISHED}{step:06d}", _items(state)
        self._pending, self._failed_here = step, False
        try:
            if reason := self._why_unwritable():
                raise CheckpointError(reason)
            writing = ocp.save_checkpointables_async(unfinished, items)
        except Exception as error:
            self._notify_others(step)
            self._note_failure(step, error)
            self.check()
        else:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), items)
            self._saving = self._worker.submit(
                self._finish, writing, unfinished, step, shapes, texts
            )

    def _why_unwritable(self) -> str | None:
        """Why a save cannot start in some process, or None in all.

        Orbax would wait 20 minutes for a folder that cannot be made, or for a process that fails.
        """
        reason = None
        try:
            if is_leader():
                self._clean_up()
                for note in self.folder.glob(f"{_FAILED}*"):
                    note.unlink()
            self._try_to_write()
        except OSError as error:
            reason = failure_reason(error)
        others = processes_where(reason is not None)
        if reason is None and others:
            reason = f"process {others[0]} cannot write there"
        return reason

    def _finish(self, writing, unfinished: Path, step: int, shapes: PyTree, texts: dict) -> None:
        index, count = jax.process_index(), jax.process_count()
        last = unfinished / "settings.json"
        try:
            writing.result()  # in process 0 after all have written theirs
            if is_leader():
                read = ocp.checkpointables_metadata(unfinished).metadata
                if reason := checkpoint_diff.array_difference(read, shapes):
                    raise CheckpointError(f"it cannot be read back: {reason}")
                for name, text in texts.items():  # the settings last
                    (unfinished / name).write_text(text)
                parts = [unfinished / manifest.name(i) for i in range(1, count)]
                self._wait_until(step, lambda: all(part.exists() for part in parts))
                manifest.write(unfinished, step, index, count)
                self._rename_into_place(unfinished, step)
            else:
                self._wait_until(step, last.exists)
                manifest.write(unfinished, step, index, count)
        except Exception as error:
            self._notify_others(step)
            self._note_failure(step, error)
        else:
            if count == 1:  # else other processes may fail yet
                self._failures = []

    def _notify_others(self, step: int) -> None:
        """Lets the processes that wait for files of this one know that there will be none."""
        if jax.process_count() > 1:
            with contextlib.suppress(OSError):
                (self.folder / f"{_FAILED}{step:06d}-{jax.process_index()}").touch()

    def _wait_until(self, step: int, condition: Callable[[], bool]) -> None:
        """Waits for files of other processes; raises if one of them has failed."""
        end = time.monotonic() + _TIMEOUT_S
        while not condition():
            if others := list(self.folder.glob(f"{_FAILED}{step:06d}-*")):
                process = others[0].name.rpartition("-")[2]
                raise CheckpointError(f"process {process} could not save its part")
            if time.monotonic() > end:
                raise CheckpointError(f"other processes have not saved theirs in {_TIMEOUT_S} s")
            time.sleep(0.02)

    def _rename_into_place(self, unfinished: Path, step: int) -> None:
        for old in self.steps():
            if old >= step:
                shutil.rmtree(self.folder / f"{old:06d}")
        os.replace(unfinished, self.folder / f"{step:06d}")
        for old in self.steps()[: -self._max_to_keep]:
            shutil.rmtree(self.folder / f"{old:06d}", ignore_errors=True)  # the next save tries too

    def _note_failure(self, step: int, error: Exception) -> None:
        """Records and logs a failed save, and frees the room that it took."""
        self._failed_here = True
        if is_leader():
            self._clean_up()
        newest = max(self.steps(), default=None)
        safe = "no step is safe" if newest is None else f"step {newest} is safe"
        what = f"step {step} could not be saved in {self.folder}: {failure_reason(error)}; {safe}"
        failure = CheckpointError(f"{what}; mend that and start the same command again")
        # Without its cause, whose traceback would keep a copy of the state alive.
        self._failures = [*self._failures, failure]
        if len(self._failures) < _MAX_FAILURES:
            left = _MAX_FAILURES - len(self._failures)
            log.warning(
                "%s; the next save tries again, and %d more in vain end the run", what, left
            )

    def _clean_up(self) -> None:
        for leftover in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def restore(
        self,
        template: TrainState,
        *,
        settings: dict | None = None,
        defaults: dict | None = None,
    ) -> tuple[int, TrainState, dict, dict] | None:
        """Restores the newest step that agrees with its manifest; logs why others do not.

        Args:
          template: a state with the structure, shapes and shardings to restore, such as
            `jax.ShapeDtypeStruct`s; only these are used.
          settings: what must agree with the saved settings; saved entries it lacks are ignored.
          defaults: values of settings that the checkpoint lacks, since it is older than they are.
        Returns:
          Step, state, data position and all saved settings, or None if nothing was saved.
        Raises:
          CheckpointError: if steps exist but all are damaged, if settings differ (each is named),
            or if the saved arrays do not fit the template.
        """
        self._finish_pending()
        step = checkpoint_folder.newest_undamaged(self.folder)
        if step is not None:
            path = self.folder / f"{step:06d}"
            saved = json.loads((path / "settings.json").read_text())
            if changes := checkpoint_diff.setting_differences(
                saved, settings or {}, defaults or {}
            ):
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self.folder} was made with other settings: "
                    f"{'; '.join(changes)}; set them back, or choose another folder for a new run"
                )
            wanted = _items(template)
            if reason := checkpoint_diff.array_difference(
                ocp.checkpointables_metadata(path).metadata, wanted
            ):
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self.folder} does not fit this model and "
                    f"optimizer: {reason}; use those it was made with, or another folder"
                )
            items = ocp.load_checkpointables(path, wanted)
            state = TrainState(
                # Sharded as the train step returns it: else the second step would compile again.
                step=jax.device_put(np.int32(step), template.step.sharding),
                params=items["params"],
                ema_params=items["ema_params"],
                opt_state=items["optimizer"],
                key=items["rng"]["key"],
                scales=items.get("scales", ()),
                powersgd=items.get("errors", ()),
            )
            return step, state, json.loads((path / "data.json").read_text()), saved
        return None


def _items(state: TrainState) -> dict[str, Any]:
    optional = {"scales": state.scales, "errors": state.powersgd}
    return {
        "params": state.params,
        "ema_params": state.ema_params,
        "optimizer": state.opt_state,
        "rng": {"key": state.key},
    } | {name: item for name, item in optional.items() if item}
