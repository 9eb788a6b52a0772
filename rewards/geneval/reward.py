"""The reward `geneval`: whether an image has the objects of its prompt, in the right number, colour and position.

The rules are GenEval's (arXiv 2310.11513). The detector is **not the official one**, a Mask2Former of mmdetection whose
environment can no longer be installed. It is the same architecture in transformers, trained on the same data. Scores
must not be compared with those in papers.
"""

from typing import Any

from PIL import Image

from rewards.geneval.models import ColorClassifier, Detector
from rewards.geneval.rules import THRESHOLD, Task, grade, keep, parse_task
from rewards.learned.running import Placement
from rewards.pictures import at_most, to_rgb

_MODES = ("strict", "soft")
_MAX_SIDE = 2048  # pixels; masks are as large as the image


class GenEval:
    """A reward from GenEval's metadata in the data columns `tag`, `include` and `exclude`.

    Args:
        mode: "strict": 1 if every requirement of the prompt is met, else 0, as in GenEval. "soft": the mean of the
            grades (:func:`rewards.geneval.rules.grade`), in [0, 1].
        detector: folder or hub name of a Mask2Former for instances of COCO. clip: folder or hub name of a CLIP.
        device: None for cuda, if available. dtype: "float32", "bfloat16" or "float16". batch_size: images at once.
        offload: keep the models on the CPU while they are not used.

    Raises:
        ValueError: an invalid argument, or a row that is not GenEval's metadata. FileNotFoundError: a checkpoint is
            missing, with how to get it.
    """

    def __init__(
        self,
        mode: str = "strict",
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 8,
        offload: bool = False,
    ):
        if mode not in _MODES:
            raise ValueError(f"geneval: mode must be one of {', '.join(_MODES)}, found {mode!r}")
        placement = Placement(device, dtype, offload, batch_size)
        self.mode = mode
        self.detector, self.colors = Detector(detector, placement), ColorClassifier(clip, placement)

    def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        tag: list[str],
        include: list[Any],
        exclude: list[Any] | None = None,
    ) -> list[float]:
        rows = zip(tag, include, exclude or [None] * len(images), strict=True)
        tasks = [parse_task(number, *row, classes=self.detector.labels) for number, row in enumerate(rows)]
        rgb_images = [at_most(to_rgb(image), _MAX_SIDE) for image in images]
        detections_by_image = self.detector(rgb_images, THRESHOLD)
        scores = []
        for image, task, detections in zip(rgb_images, tasks, detections_by_image, strict=True):
            grades = self._grades(image, task, detections)
            scores.append(float(min(grades) == 1) if self.mode == "strict" else sum(grades) / len(grades))
        return scores

    def _grades(self, image: Image.Image, task: Task, detections: list) -> list[float]:
        return grade(task, keep(detections, task.threshold), lambda objects: self.colors(image, objects))
