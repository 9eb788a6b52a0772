"""The bounded queue of a service's requests for one reward, which are scored one after the other in a thread."""

import asyncio
import collections
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rewards.calling import score_one
from rewards.contract import Answer, Reward, RunsElsewhere
from rewards.hints import nearest
from rewards.remote.wire import ContentError, Request
from rewards.threads import EventLoop, in_thread

#: The health page reports a call that takes longer than this many seconds.
STUCK_SECONDS = 600.0


class Busy(Exception):
    """Too many requests are waiting; ``seconds``: when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {seconds} s")
        self.seconds = seconds


class Metrics:
    """The Prometheus metrics of a service, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: Any = {"registry": self.registry, "namespace": "flow_align"}
        self.requests = Counter("reward_requests", "Requests by status of the answer.", ["reward", "status"], **common)
        self.images = Counter("reward_images", "Images in successful calls.", ["reward"], **common)
        self.failures = Counter("reward_failures", "Calls in which the reward raised.", ["reward"], **common)
        self.queue = Gauge("reward_queue", "Waiting requests.", ["reward"], **common)
        buckets = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
        self.seconds = Histogram(
            "reward_seconds", "Seconds of a call of the reward.", ["reward"], buckets=buckets, **common
        )


@dataclass(eq=False)
class _Job:
    request: Request
    answer: "asyncio.Future[Answer]"


class Lane:
    """The queue of one reward.

    With ``max_batch_size`` 0 each request is one call of the reward: a reward may compare the images of a call, and one
    that does not may still give other last bits in a batch of another size. With more, waiting requests are joined up
    to that many images, for which the first one waits ``max_wait`` seconds.
    """

    def __init__(
        self, reward: Reward, metrics: Metrics, max_queue: int = 64, max_batch_size: int = 0, max_wait: float = 0.0
    ) -> None:
        self.reward, self.metrics, self.max_queue = reward, metrics, max_queue
        self.max_batch_size, self.max_wait = max_batch_size, max_wait
        #: Its own, so that an async reward that blocks delays no other.
        self.loop = EventLoop()
        self._jobs: collections.deque[_Job] = collections.deque()
        self._new_job = asyncio.Event()
        self._call_started: float | None = None  # time.monotonic(), None between calls
        self._last_seconds = 1.0

    def close(self) -> None:
        """Release what the reward holds."""
        self.reward.close(self.loop)

    def check(self, request: Request) -> None:
        """Raise ContentError for a column that the reward does not take, or a missing one that it needs."""
        reward = self.reward
        for column in request.columns if reward.columns is not None else ():
            if column not in (reward.columns or ()):
                raise ContentError(
                    f"reward {reward.name!r} does not take a column {column!r}." + nearest(column, reward.columns or ())
                )
        try:
            reward.check_columns(request.columns)
        except ValueError as error:
            raise ContentError(str(error)) from None

    async def submit(self, request: Request, client_is_gone: Coroutine[Any, Any, None]) -> Answer:
        """Queue a request and return its answer.

        Args:
            client_is_gone: ends when nobody waits for the scores any more; then the request leaves the queue.

        Raises:
            Busy: the queue is full. ConnectionAbortedError: the client is gone. Otherwise what the reward raised.
        """
        if len(self._jobs) >= self.max_queue:
            client_is_gone.close()
            raise Busy(max(1, min(60, round(self._last_seconds * len(self._jobs) / 2))))
        job = _Job(request, asyncio.get_running_loop().create_future())
        watch = asyncio.create_task(client_is_gone)
        watch.add_done_callback(lambda _: self._abandon(job))
        self._jobs.append(job)
        self._new_job.set()
        self.metrics.queue.labels(self.reward.name).set(len(self._jobs))
        try:
            return await job.answer
        finally:
            watch.cancel()

    def _abandon(self, job: _Job) -> None:
        """Take a job whose client is gone out of the queue; its place is free for another."""
        if job.answer.done():
            return
        job.answer.set_exception(ConnectionAbortedError("the client closed the connection"))
        if job in self._jobs:
            self._jobs.remove(job)
            self.metrics.queue.labels(self.reward.name).set(len(self._jobs))

    def state(self) -> dict[str, Any]:
        """Return what the health page shows: the problem, if any, the queue's length, the seconds of the current call."""
        problem = self.reward.function.problem() if isinstance(self.reward.function, RunsElsewhere) else None
        seconds = 0.0 if self._call_started is None else time.monotonic() - self._call_started
        if problem is None and seconds > STUCK_SECONDS:
            problem = f"busy with one call for {seconds:.0f} s"
        return {"ready": problem is None, "problem": problem, "queue": len(self._jobs), "seconds": round(seconds, 3)}

    async def revive(self) -> None:
        """Start the reward's worker again if it is dead, unless a call is in progress, which does so itself."""
        if isinstance(self.reward.function, RunsElsewhere) and self._call_started is None:
            await in_thread(self.reward.function.revive)

    async def run(self) -> None:
        """Score the queued requests, forever."""
        while True:
            while not self._jobs:
                self._new_job.clear()
                await self._new_job.wait()
            jobs = [self._jobs.popleft()]
            if self.max_batch_size:
                await self._join(jobs)
            self.metrics.queue.labels(self.reward.name).set(len(self._jobs))
            jobs = [job for job in jobs if not job.answer.done()]
            if jobs and (len(jobs) == 1 or not await self._score(jobs, last_try=False)):
                for job in jobs:  # they failed together, perhaps because of one of them
                    await self._score([job], last_try=True)

    async def _join(self, jobs: list[_Job]) -> None:
        """Add jobs with the same columns while the batch has room and there is time."""
        room = self.max_batch_size - len(jobs[0].request.prompts)
        deadline = time.monotonic() + self.max_wait
        while room > 0:
            while self._jobs:
                next_request = self._jobs[0].request
                if set(next_request.columns) != set(jobs[0].request.columns) or len(next_request.prompts) > room:
                    return
                jobs.append(self._jobs.popleft())
                room -= len(next_request.prompts)
            self._new_job.clear()
            try:
                await asyncio.wait_for(self._new_job.wait(), deadline - time.monotonic())
            except TimeoutError:
                return

    async def _score(self, jobs: list[_Job], last_try: bool) -> bool:
        """Call the reward once and return whether it succeeded; only the last try passes its error to the jobs."""
        requests = [job.request for job in jobs]
        images = [image for request in requests for image in request.images]
        prompts = [prompt for request in requests for prompt in request.prompts]
        columns = {name: [v for request in requests for v in request.columns[name]] for name in requests[0].columns}
        self._call_started, name = time.monotonic(), self.reward.name
        try:
            answer = await in_thread(score_one, self.reward, images, prompts, columns, self.loop)
        except Exception as error:  # whatever a reward raises is reported to its clients, and the queue goes on
            self.metrics.failures.labels(name).inc()
            for job in jobs if last_try else ():
                if not job.answer.done():
                    job.answer.set_exception(error)
            return False
        finally:
            self._last_seconds, self._call_started = time.monotonic() - self._call_started, None
            self.metrics.seconds.labels(name).observe(self._last_seconds)
        self.metrics.images.labels(name).inc(len(images))
        start = 0
        for job in jobs:
            rows = slice(start, start := start + len(job.request.prompts))
            if not job.answer.done():
                job.answer.set_result(_share(answer, rows))
        return True


def _share(answer: Answer, rows: slice) -> Answer:
    """Return a job's part of an answer; an extra that has no value for each image is of the call, and of all its jobs."""
    images = len(answer.scores)
    extras = {name: values[rows] if len(values) == images else values for name, values in answer.extras.items()}
    return Answer(answer.scores[rows], extras)
