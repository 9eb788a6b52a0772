"""What a service does with the requests for one reward: one after the other, in a thread, with a queue that has an end."""

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rewards.calling import as_json, score_one
from rewards.contract import Reward
from rewards.hints import nearest
from rewards.remote.threads import in_thread
from rewards.remote.wire import ContentError, Request

#: A call that takes longer than this many seconds is reported by the health page.
STUCK_SECONDS = 600.0


class Busy(Exception):
    """More requests wait than may; ``seconds``: when to come again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {seconds} s")
        self.seconds = seconds


class Metrics:
    """What the metrics page shows, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        at: Any = {"registry": self.registry, "namespace": "flow_align"}
        self.requests = Counter("reward_requests", "Requests, by the status of the answer.", ["reward", "status"], **at)
        self.images = Counter("reward_images", "Images that were scored or left unscored.", ["reward"], **at)
        self.failures = Counter("reward_failures", "Calls in which the reward raised.", ["reward"], **at)
        self.queue = Gauge("reward_queue", "Requests that wait.", ["reward"], **at)
        buckets = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
        self.seconds = Histogram(
            "reward_seconds", "Seconds of a call of the reward.", ["reward"], buckets=buckets, **at
        )


@dataclass(eq=False)
class _Job:
    request: Request
    answer: "asyncio.Future[list[float | None]]"
    gone: Callable[[], Awaitable[bool]]


class Lane:
    """The queue of one reward.

    With ``max_batch_size`` 0 each request is one call of the reward, as it was made: a reward may look at all images of
    a call, and even one that does not gives other last bits in a batch of another size. With more, requests that
    wait are joined up to so many images, for which the first waits ``max_wait`` seconds; their scores are split again.
    """

    def __init__(
        self, reward: Reward, metrics: Metrics, max_queue: int = 64, max_batch_size: int = 0, max_wait: float = 0.0
    ) -> None:
        self.reward, self.metrics, self.max_queue = reward, metrics, max_queue
        self.max_batch_size, self.max_wait = max_batch_size, max_wait
        self._jobs: collections.deque[_Job] = collections.deque()
        self._came = asyncio.Event()
        self._since: float | None = None
        self._last_seconds = 1.0

    def check(self, request: Request) -> None:
        """Raise ContentError for columns that the reward does not take, or needs and lacks."""
        reward = self.reward
        for column in request.columns if reward.columns is not None else ():
            if column not in (reward.columns or ()):
                raise ContentError(
                    f"reward {reward.name!r} takes no column {column!r}." + nearest(column, reward.columns or ())
                )
        try:
            reward.check_columns(request.columns)
        except ValueError as error:
            raise ContentError(str(error)) from None

    async def submit(self, request: Request, gone: Callable[[], Awaitable[bool]]) -> list[float | None]:
        """Scores, in their turn. ``gone`` says whether anybody still waits for them. Raises Busy, or what the reward did."""
        if len(self._jobs) >= self.max_queue:
            raise Busy(max(1, min(60, round(self._last_seconds * len(self._jobs) / 2))))
        job = _Job(request, asyncio.get_running_loop().create_future(), gone)
        self._jobs.append(job)
        self._came.set()
        self.metrics.queue.labels(self.reward.name).set(len(self._jobs))
        return await job.answer

    def state(self) -> dict[str, Any]:
        """For the health page: what is wrong, if anything, and how much there is to do."""
        problem = getattr(self.reward.function, "problem", lambda: None)()
        seconds = 0.0 if self._since is None else time.monotonic() - self._since
        if problem is None and seconds > STUCK_SECONDS:
            problem = f"busy with one call for {seconds:.0f} s"
        return {"ready": problem is None, "problem": problem, "queue": len(self._jobs), "seconds": round(seconds, 3)}

    async def revive(self) -> None:
        """Start the reward's worker again if it is dead and nobody asks for scores, who would do so."""
        revive = getattr(self.reward.function, "revive", None)
        if revive is not None and self._since is None:
            await in_thread(revive)

    async def run(self) -> None:
        """Work through the queue for ever."""
        while True:
            while not self._jobs:
                self._came.clear()
                await self._came.wait()
            jobs = [self._jobs.popleft()]
            if self.max_batch_size:
                await self._join(jobs)
            self.metrics.queue.labels(self.reward.name).set(len(self._jobs))
            jobs = [job for job in jobs if not await self._dropped(job)]
            if jobs and (len(jobs) == 1 or not await self._score(jobs, last_try=False)):
                for job in jobs:  # together they fail, which need not be the fault of all
                    await self._score([job], last_try=True)

    async def _dropped(self, job: _Job) -> bool:
        """Whether nobody waits for it any more: then it is answered with that, and not scored."""
        gone = job.answer.done() or await job.gone()
        if gone and not job.answer.done():
            job.answer.set_exception(ConnectionAbortedError("the client went away"))
        return gone

    async def _join(self, jobs: list[_Job]) -> None:
        """Take more jobs with the same columns, as long as there is room and time."""
        room = self.max_batch_size - len(jobs[0].request.prompts)
        until = time.monotonic() + self.max_wait
        while room > 0:
            while self._jobs:
                following = self._jobs[0].request
                if set(following.columns) != set(jobs[0].request.columns) or len(following.prompts) > room:
                    return
                jobs.append(self._jobs.popleft())
                room -= len(following.prompts)
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), until - time.monotonic())
            except TimeoutError:
                return

    async def _score(self, jobs: list[_Job], last_try: bool) -> bool:
        """One call of the reward; whether it succeeded. Only the last try tells what was raised."""
        requests = [job.request for job in jobs]
        images = [image for request in requests for image in request.images]
        prompts = [prompt for request in requests for prompt in request.prompts]
        columns = {name: [v for request in requests for v in request.columns[name]] for name in requests[0].columns}
        self._since, name = time.monotonic(), self.reward.name
        try:
            scores = as_json(await in_thread(score_one, self.reward, images, prompts, columns))
        except Exception as error:  # whatever a reward raises is its client's to know, and the lane goes on
            self.metrics.failures.labels(name).inc()
            for job in jobs if last_try else ():
                if not job.answer.done():
                    job.answer.set_exception(error)
            return False
        finally:
            self._last_seconds, self._since = time.monotonic() - self._since, None
            self.metrics.seconds.labels(name).observe(self._last_seconds)
        self.metrics.images.labels(name).inc(len(images))
        for job in jobs:
            mine, scores = scores[: len(job.request.prompts)], scores[len(job.request.prompts) :]
            if not job.answer.done():
                job.answer.set_result(mine)
        return True
