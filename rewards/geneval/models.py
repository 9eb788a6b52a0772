"""The two models of the reward `geneval`: instance segmentation for the objects, CLIP for their colours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from rewards.geneval.rules import COLORS, Detection, class_name
from rewards.learned.running import Placement
from rewards.learned.weight_files import IMAGE_PROCESSOR_FILES, MODEL_FILES, TOKENIZER_FILES, find_folder, load_model

_GREY = (153, 153, 153)  # GenEval's background for an object that is cut out
_TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


class Detector:
    """Mask2Former of transformers, with its output interpreted like that of mmdetection's instance head.

    A candidate is a query and a class. Its score is the probability of the class times the mean probability of the mask
    inside the mask; its box is the bounding box of the mask.
    """

    def __init__(self, checkpoint: str, placement: Placement):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        folder = find_folder(checkpoint, MODEL_FILES | IMAGE_PROCESSOR_FILES, reward="geneval", arg="detector")
        self.model = load_model(
            Mask2FormerForUniversalSegmentation, folder, reward="geneval", dtype=placement.torch_dtype
        ).eval()
        self.processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        self.labels = [class_name(label) for _, label in sorted(self.model.config.id2label.items())]
        self.placement = placement

    def __call__(self, images: Sequence[Image.Image], threshold: float) -> list[list[Detection]]:
        """Return the detections in each RGB image with scores above the threshold, best first, at most 100."""
        # Batches of images of one size need no padding, so that other images do not change an image's detections.
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.size, []).append(index)
        detections: dict[int, list[Detection]] = {}
        with self.placement.running(self.model) as device:
            for same_size in by_size.values():
                for batch in self.placement.batches(len(same_size)):
                    chosen = same_size[batch]
                    results = self._detect_batch([images[i] for i in chosen], threshold, device)
                    detections |= zip(chosen, results, strict=True)
        return [detections[index] for index in range(len(images))]

    def _detect_batch(self, images: list[Image.Image], threshold: float, device: torch.device) -> list[list[Detection]]:
        inputs = self.processor(images=images, return_tensors="pt")
        pixels = inputs["pixel_values"].to(device, self.model.dtype)
        output = self.model(pixel_values=pixels)
        outputs = zip(output.class_queries_logits, output.masks_queries_logits, images, strict=True)
        size = (pixels.shape[-2], pixels.shape[-1])
        return [self._detections(logits, masks, size, image, threshold) for logits, masks, image in outputs]

    def _detections(
        self,
        logits: torch.Tensor,
        masks: torch.Tensor,
        size: tuple[int, int],
        image: Image.Image,
        threshold: float,
    ) -> list[Detection]:
        probability = logits.float().softmax(-1)[:, :-1]  # the last class is "no object"
        values, indices = probability.flatten().topk(min(100, probability.numel()))
        detections = []
        # The mask can only lower a score, so that masks of candidates below the threshold are not needed.
        for value, index in zip(values.tolist(), indices.tolist(), strict=True):
            if value <= threshold:
                break
            query, label = divmod(index, probability.shape[1])
            mask, mask_probability = _mask(masks[query], size, image)
            if mask is not None and value * mask_probability > threshold:
                detections.append(Detection(self.labels[label], value * mask_probability, _box(mask), mask))
        return sorted(detections, key=lambda d: -d.score)


def _mask(logits: torch.Tensor, size: tuple[int, int], image: Image.Image) -> tuple[Any, float]:
    """Return the mask of a query in the image's pixels, None if it is empty, and its mean probability inside the mask.

    size: height and width of the model's input.
    """

    def resize(values: torch.Tensor, new_size: tuple[int, int]) -> torch.Tensor:
        return torch.nn.functional.interpolate(values[None, None], size=new_size, mode="bilinear")[0, 0]

    in_image = resize(resize(logits.float(), size), (image.height, image.width))
    mask = in_image > 0
    if not mask.any():
        return None, 0.0
    return mask.cpu().numpy(), float(in_image.sigmoid()[mask].mean())


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ColorClassifier:
    """Zero-shot classification with CLIP: which of GenEval's ten colours an object has, cut out on grey."""

    def __init__(self, checkpoint: str, placement: Placement):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        files = MODEL_FILES | TOKENIZER_FILES | IMAGE_PROCESSOR_FILES
        folder = find_folder(checkpoint, files, reward="geneval", arg="clip")
        self.model = load_model(CLIPModel, folder, reward="geneval", dtype=placement.torch_dtype).eval()
        self.processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.placement = placement
        self._colors: dict[str, torch.Tensor] = {}  # label: (colours, width), on the CPU

    def __call__(self, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
        """Return the names of the colours of objects of one class in an RGB image."""
        if not objects:
            return []
        crops = [crop(image, detection) for detection in objects]
        with self.placement.running(self.model) as device:
            colors = self._color_embeddings(objects[0].label, device)
            chosen: list[int] = []
            for batch in self.placement.batches(len(crops)):
                inputs = self.processor(images=crops[batch], return_tensors="pt")
                pixels = inputs["pixel_values"].to(device, self.model.dtype)
                features = self.model.get_image_features(pixel_values=pixels).pooler_output.float().cpu()
                chosen += (torch.nn.functional.normalize(features, dim=-1) @ colors.T).argmax(-1).tolist()
        return [COLORS[index] for index in chosen]

    def _color_embeddings(self, label: str, device: torch.device) -> torch.Tensor:
        """Return a unit embedding for each colour of a class, the mean over the templates."""
        if label not in self._colors:
            texts = [template.format(color=color, label=label) for color in COLORS for template in _TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
            features = torch.nn.functional.normalize(
                self.model.get_text_features(**tokens).pooler_output.float().cpu(), dim=-1
            )
            means = features.reshape(len(COLORS), len(_TEMPLATES), -1).mean(1)
            self._colors[label] = torch.nn.functional.normalize(means, dim=-1)
        return self._colors[label]


def crop(image: Image.Image, detection: Detection) -> Image.Image:
    """Cut an object out of an RGB image, with grey outside its mask."""
    if detection.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, _GREY), Image.fromarray(detection.mask))
    left, top, right, bottom = detection.box
    return image.crop((int(left), int(top), int(right), int(bottom)))
