"""One thread that samples: it joins the images of all requests into batches of compiled sizes."""

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int, UInt8

from dalle_jax.errors import UserError
from dalle_jax.generate.joint_sampler import ImageSpec, largest_batch, sample_jointly
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.sheet import PAPER
from dalle_jax.serve.config import ServeConfig
from dalle_jax.serve.job import Job
from dalle_jax.serve.metrics import Metrics

_log = logging.getLogger("dalle_jax")

Grids = Int[np.ndarray, "B G G"]


class QueueFullError(Exception):
    """More images wait than the server takes on."""

    def __init__(self, retry_after: int):
        super().__init__(f"the server is busy; try again in {retry_after} s")
        self.retry_after = retry_after


class Worker:
    """Samples jobs in the order in which they come; those alike share batches.

    The size of a batch is the largest power of two that the waiting images fill, so that nothing is
    padded and few programs are compiled.

    Args:
      model: samples; nothing else may use it meanwhile.
      config: limits.
      metrics: counts what is done.
    """

    def __init__(self, model: Model, config: ServeConfig, metrics: Metrics):
        self._model, self._config, self._metrics = model, config, metrics
        self._jobs: list[Job] = []  # those with images that are in no batch yet
        self._pending = 0  # images of accepted jobs that are not finished
        self._seconds_each = 1.0  # per image, a moving average
        self._stopping = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Waits until all accepted jobs are done, and ends the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Accepts a job.

        Raises:
          QueueFullError: if too many images wait already; it says for how long.
        """
        with self._condition:
            if self._pending + job.request.n > self._config.max_waiting:
                raise QueueFullError(max(1, math.ceil(self._pending * self._seconds_each)))
            self._change_pending(job.request.n)
            self._jobs.append(job)
            self._condition.notify()

    def warm_up(self) -> None:
        """Compiles each size of batch for the default settings; to be called before `start`."""
        sampling, size = self._model.as_recommended(SamplingConfig()), 1
        part = self._model.prior_for(sampling)
        while size <= self._largest(part, sampling):
            for _, grids in self._passes(part, sampling, [ImageSpec("image", 0, 0)] * size):
                self._model.decode(np.where(grids == self._model.codec.codes, 0, grids))
            _log.info("batches of %d are compiled", size)
            size *= 2

    def withdraw(self, job: Job) -> None:
        """Gives up a job: its images that are in no batch yet leave the queue at once."""
        with self._condition:
            job.cancel()
            self._drop(job)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._jobs and not self._stopping:
                    self._condition.wait()
                if not self._jobs:
                    return
                jobs = list(self._jobs)
            batch = self._next_batch(jobs)
            if batch:
                self._sample(batch)

    def _next_batch(self, jobs: Sequence[Job]) -> list[tuple[Job, int]]:
        """Images of the first job, and of later ones that can be sampled with them."""
        ready = [job for job in jobs if self._is_ready(job)]
        with self._condition:
            ready = [job for job in ready if not job.cancelled]  # meanwhile
            if not ready:
                return []
            alike = [job for job in ready if job.batch_key == ready[0].batch_key]
            waiting = [(job, i) for job in alike for i in range(job.next_number, job.request.n)]
            largest = min(len(waiting), self._largest(ready[0].part, ready[0].sampling))
            batch = waiting[: 2 ** (largest.bit_length() - 1)]
            for job, number in batch:
                job.next_number = number + 1
            self._jobs = [job for job in self._jobs if job.next_number < job.request.n]
        return batch

    def _is_ready(self, job: Job) -> bool:
        if job.cancelled:
            return False
        if job.part is None:
            try:
                job.prepare(self._model)
            except Exception as error:
                self._fail(job, error)
                return False
        return True

    def _largest(self, part: str, sampling: SamplingConfig) -> int:
        fits = largest_batch(self._model.priors[part][0], sampling)
        return 2 ** (min(fits, self._config.max_batch).bit_length() - 1)

    def _sample(self, batch: Sequence[tuple[Job, int]]) -> None:
        start, jobs = time.perf_counter(), list(dict.fromkeys(job for job, _ in batch))
        specs = [job.spec(number) for job, number in batch]
        try:
            for is_last, grids in self._passes(jobs[0].part, jobs[0].sampling, specs):
                if all(job.cancelled for job in jobs):
                    break
                if is_last:
                    images = self._model.decode(grids)
                    for (job, number), image in zip(batch, images, strict=True):
                        job.add(number, image)
                elif any(job.on_progress is not None for job in jobs):
                    images = partial_images(self._model, grids)
                    for (job, number), image in zip(batch, images, strict=True):
                        job.show(number, image)
            for job in jobs:
                if job.cancelled:
                    self._fail(job, UserError("the client has gone"))
                elif not job.unfinished:
                    job.finish(self._model)
        except Exception as error:
            for job in jobs:
                self._fail(job, error)
        took = time.perf_counter() - start
        self._seconds_each += 0.2 * (took / len(batch) - self._seconds_each)
        self._metrics.batch_seconds.observe(took)
        self._metrics.batch_size.observe(len(batch))
        self._metrics.images.inc(len(batch))
        with self._condition:
            self._change_pending(-len(batch))

    def _passes(
        self, part: str, sampling: SamplingConfig, specs: Sequence[ImageSpec]
    ) -> Iterator[tuple[bool, Grids]]:
        """Grids on their way, and whether they are the last ones."""
        config, params = self._model.priors[part]
        passes = sample_jointly(config, params, self._model.tokenizer, specs, sampling=sampling)
        grids = next(passes)
        for later in passes:
            yield False, grids
            grids = later
        yield True, grids

    def _fail(self, job: Job, error: Exception) -> None:
        if job.result.done():
            return
        if not isinstance(error, UserError):
            _log.error("a request failed", exc_info=error)
        with self._condition:
            self._drop(job)
        job.result.set_exception(error)

    def _drop(self, job: Job) -> None:
        """Takes images that are in no batch out of the queue; the lock is held."""
        self._change_pending(job.next_number - job.request.n)
        job.next_number = job.request.n
        self._jobs = [other for other in self._jobs if other is not job]

    def _change_pending(self, change: int) -> None:
        self._pending += change
        self._metrics.pending.set(self._pending)


def partial_images(model: Model, grids: Grids) -> UInt8[np.ndarray, "B R R 3"]:
    """Decodes grids with empty cells, which become grey.

    For the decoder they hold the first code that is there, since it sees neighbours too.
    """
    empty = grids == model.codec.codes
    flat = grids.reshape(len(grids), -1)
    codes = np.take_along_axis(flat, empty.reshape(flat.shape).argmin(1)[:, None], axis=1)
    codes = np.where(codes == model.codec.codes, 0, codes)  # all are empty
    images = model.decode(np.where(empty, codes[..., None], grids))
    factor = model.codec.factor
    images[empty.repeat(factor, 1).repeat(factor, 2)] = PAPER
    return images
