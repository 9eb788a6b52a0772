"""What two processes agree on: the checkpoint they go on from, and the figures of an evaluation that they share."""

import json
from pathlib import Path

import pytest
import torch
from brightness import score as brightness
from datasets import Dataset
from launched import TWO, run

from align.engine.checkpoints import written
from align.models.families import load_model
from align.sampling.held_out import Evaluation, evaluate_prompts
from align.sampling.rollout import SamplingPlan
from rewards import load_rewards

#: What each of the two processes does; it writes what it found beside what the other one writes.
SCRIPT = """
import json, sys
sys.path[:0] = [{here!r}, {helpers!r}]
from accelerate import PartialState
state = PartialState(cpu=True, backend="gloo")
from align.engine.resume import plan_resume
from align.engine.settings import FlowConfig
from test_agreement import evaluation, grid
try:
    plan_resume(FlowConfig(f"of-{{state.process_index}}", use_cpu=True), {{}}, "true")
    said = ""
except ValueError as error:
    said = str(error)
found = evaluation((state.process_index, 2))
with open(f"{{state.process_index}}.json", "w") as file:
    json.dump({{"said": said, "metrics": found.metrics, "rows": found.rows, "grid": grid(found)}}, file)
"""


def some(images, prompts):
    """Crosses are not scored."""
    return [None if "cross" in p else s for s, p in zip(brightness(images, prompts), prompts, strict=True)]


def evaluation(process: tuple[int, int]) -> Evaluation:
    """Five prompts, which two processes cannot share evenly, of two images each."""
    torch.set_num_threads(1)
    data = Dataset.from_dict({"prompt": ["a circle", "two crosses", "a red square", "a triangle", "blue objects"]})
    plan = SamplingPlan(64, 64, num_inference_steps=2, batch_size=2)
    return evaluate_prompts(
        load_model("tiny"), load_rewards([some]), data, plan, seed=3, samples=2, prefix="eval", process=process,
        keep_images_of=2,
    )  # fmt: skip


def grid(found: Evaluation) -> dict[str, float]:
    """How bright the images of each prompt of the grid are, in their order."""
    return {f"{prompt} {n}": value for prompt, images in found.images for n, value in enumerate(brightness(images, []))}


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    """What the two processes found, each of which sees another latest checkpoint."""
    folder = tmp_path_factory.mktemp("both")
    for process, step in ((0, 4), (1, 2)):
        with written(folder / f"of-{process}" / f"checkpoint-{step}", {}, True):
            pass
    script = SCRIPT.format(here=str(Path(__file__).parent), helpers=str(Path(__file__).parents[1] / "helpers"))
    (folder / "script.py").write_text(script)
    run(folder, *TWO, folder / "script.py")
    return [json.loads((folder / f"{process}.json").read_text()) for process in (0, 1)]


def test_processes_that_see_different_checkpoints_all_say_so(both):
    """On machines with an output_dir each, a run would go on with weights of different updates, or wait for ever."""
    for found in both:
        assert "different checkpoints (process 0: checkpoint-4, process 1: checkpoint-2)" in found["said"]


def test_two_processes_evaluate_as_one(both):
    """A prompt that is counted twice, or whose figures stand beside another prompt, would be another result."""
    alone = evaluation((0, 1))
    assert alone.metrics["eval_num_prompts"] == 5 and [row["row"] for row in alone.rows] == list(range(5))
    assert len(grid(alone)) == 4
    for found in both:
        assert found["metrics"] == pytest.approx(alone.metrics, abs=1e-4)
        assert found["grid"] == pytest.approx(grid(alone), abs=1e-4) and list(found["grid"]) == list(grid(alone))
        for one, other in zip(found["rows"], alone.rows, strict=True):
            assert one == pytest.approx(other, abs=1e-4) if "cross" not in one["prompt"] else one["some"] is None
