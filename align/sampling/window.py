"""The window of stochastic steps: which steps of a rollout are an SDE's, and so can be trained."""

from dataclasses import dataclass
from typing import Literal

from align.maths.flow import SDEType
from align.sampling.noise import seeded_noise

WindowSchedule = Literal["random", "sliding"]


@dataclass(frozen=True)
class SDEWindow:
    """Which consecutive steps of a rollout are stochastic (Flow-GRPO-Fast, MixGRPO).

    Args:
        num_inference_steps: denoising steps of a rollout.
        sde_type: the last step of ``cps`` has no noise.
        size: the number of stochastic steps; None takes all that can be, within ``bounds``.
        bounds: [first, end): where the window may lie; None starts it at step 0.
        schedule: within ``bounds``, ``random`` draws a place for each rollout, ``sliding`` moves through them.
        interval, stride: sliding: rollouts before the window moves, and steps by which it moves.
        seed: of the random places.

    Raises:
        ValueError: naming the option on the command line that does not fit.
    """

    num_inference_steps: int
    sde_type: SDEType = "sde"
    size: int | None = None
    bounds: tuple[int, ...] | None = None
    schedule: WindowSchedule = "random"
    interval: int = 25
    stride: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bounds is not None and len(self.bounds) != 2:
            raise ValueError(f"sde_window_range must be two numbers, [first, end), found {list(self.bounds)}")
        stochastic, steps = self._stochastic_steps(), f"{self.num_inference_steps} steps"
        if self.sde_type == "cps":
            steps += ", the last of cps having no noise"
        if self.bounds is None and not 1 <= self.width <= stochastic:
            raise ValueError(f"sde_window_size {self.width} must lie within [1, {stochastic}]: {steps}")
        first, end = self._range()
        if not 0 <= first < end <= stochastic:
            raise ValueError(f"sde_window_range {[first, end]} must lie within [0, {stochastic}]: {steps}")
        if not 1 <= self.width <= end - first:
            raise ValueError(
                f"sde_window_size {self.width} must be between 1 and the {end - first} steps of sde_window_range"
            )

    @property
    def width(self) -> int:
        """The number of stochastic, trained steps of a rollout."""
        if self.size is not None:
            return self.size
        return self._stochastic_steps() if self.bounds is None else self.bounds[1] - self.bounds[0]

    def _stochastic_steps(self) -> int:
        return self.num_inference_steps - (1 if self.sde_type == "cps" else 0)

    def _range(self) -> tuple[int, int]:
        return (0, self.width) if self.bounds is None else (self.bounds[0], self.bounds[1])

    def steps(self, rollout_index: int) -> tuple[int, ...]:
        """Return the stochastic steps of a rollout.

        They are the same for all images and processes, or groups would not compare.
        """
        first, end = self._range()
        places = end - first - self.width + 1
        if self.schedule == "sliding":
            start = first + rollout_index // self.interval * self.stride % places
        else:
            start = first + int(seeded_noise((self.seed, rollout_index, "sde_window"), (places,)).argmax())
        return tuple(range(start, start + self.width))
