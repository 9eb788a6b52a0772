"""The two models behind the `geneval` reward: an instance segmenter for the objects, CLIP for their colours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from rewards.geneval.rules import COLORS, Detection, class_name
from rewards.learned.running import Placement
from rewards.learned.weight_files import IMAGES, MODEL, TOKENIZER, find_folder, load_model

_GREY = (153, 153, 153)  # what GenEval puts around a masked object
_TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


class Detector:
    """Mask2Former of transformers, its answers read as mmdet's instance head reads them.

    A candidate is a query and a class; its score is the class's probability times the mean probability of its mask
    inside the mask. Its box is that of the mask.
    """

    def __init__(self, checkpoint: str, placement: Placement):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        folder = find_folder(checkpoint, MODEL | IMAGES, reward="geneval", arg="detector")
        self.model = load_model(
            Mask2FormerForUniversalSegmentation, folder, reward="geneval", dtype=placement.torch_dtype
        ).eval()
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.labels = [class_name(label) for _, label in sorted(self.model.config.id2label.items())]
        self.placement = placement

    def __call__(self, images: Sequence[Image.Image], threshold: float) -> list[list[Detection]]:
        """Detections scored above the threshold in each RGB image, best first, 100 at most."""
        # Images of one size together: nothing is padded, so an image's neighbours do not change what is seen in it.
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.size, []).append(index)
        found: dict[int, list[Detection]] = {}
        with self.placement.running(self.model) as device:
            for same in by_size.values():
                for part in self.placement.batches(len(same)):
                    chosen = same[part]
                    found |= zip(chosen, self._batch([images[i] for i in chosen], threshold, device), strict=True)
        return [found[index] for index in range(len(images))]

    def _batch(self, images: list[Image.Image], threshold: float, device: torch.device) -> list[list[Detection]]:
        inputs = self.processor(images=images, return_tensors="pt")
        pixels = inputs["pixel_values"].to(device, self.model.dtype)
        output = self.model(pixel_values=pixels)
        answers = zip(output.class_queries_logits, output.masks_queries_logits, images, strict=True)
        size = (pixels.shape[-2], pixels.shape[-1])
        return [self._detections(logits, masks, size, image, threshold) for logits, masks, image in answers]

    def _detections(
        self,
        logits: torch.Tensor,
        masks: torch.Tensor,
        size: tuple[int, int],
        image: Image.Image,
        threshold: float,
    ) -> list[Detection]:
        probability = logits.float().softmax(-1)[:, :-1]  # the last class is "no object"
        values, places = probability.flatten().topk(min(100, probability.numel()))
        detections = []
        # A mask only lowers a score: what is below the threshold already need not be enlarged.
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            if value <= threshold:
                break
            query, label = divmod(place, probability.shape[1])
            mask, certainty = _mask(masks[query], size, image)
            if mask is not None and value * certainty > threshold:
                detections.append(Detection(self.labels[label], value * certainty, _box(mask), mask))
        return sorted(detections, key=lambda d: -d.score)


def _mask(logits: torch.Tensor, size: tuple[int, int], image: Image.Image) -> tuple[Any, float]:
    """The mask of one query in the image's own pixels and its mean probability there; None where it is empty.

    size: height and width of what the model saw.
    """

    def enlarge(picture: torch.Tensor, to: tuple[int, int]) -> torch.Tensor:
        return torch.nn.functional.interpolate(picture[None, None], size=to, mode="bilinear")[0, 0]

    whole = enlarge(enlarge(logits.float(), size), (image.height, image.width))
    mask = whole > 0
    if not mask.any():
        return None, 0.0
    return mask.cpu().numpy(), float(whole.sigmoid()[mask].mean())


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ColorClassifier:
    """CLIP, zero-shot: which of GenEval's ten colours an object has, cut out and put on grey."""

    def __init__(self, checkpoint: str, placement: Placement):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        folder = find_folder(checkpoint, MODEL | TOKENIZER | IMAGES, reward="geneval", arg="clip")
        self.model = load_model(CLIPModel, folder, reward="geneval", dtype=placement.torch_dtype).eval()
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.placement = placement
        self._colors: dict[str, torch.Tensor] = {}  # label: (colours, width), on the CPU

    def __call__(self, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
        """Names of the colours of objects of one class in an RGB image."""
        if not objects:
            return []
        crops = [crop(image, found) for found in objects]
        with self.placement.running(self.model) as device:
            colors = self._classifier(objects[0].label, device)
            chosen: list[int] = []
            for part in self.placement.batches(len(crops)):
                inputs = self.processor(images=crops[part], return_tensors="pt")
                pixels = inputs["pixel_values"].to(device, self.model.dtype)
                features = self.model.get_image_features(pixel_values=pixels).pooler_output.float().cpu()
                chosen += (torch.nn.functional.normalize(features, dim=-1) @ colors.T).argmax(-1).tolist()
        return [COLORS[index] for index in chosen]

    def _classifier(self, label: str, device: torch.device) -> torch.Tensor:
        if label not in self._colors:
            texts = [template.format(color=color, label=label) for color in COLORS for template in _TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
            features = torch.nn.functional.normalize(
                self.model.get_text_features(**tokens).pooler_output.float().cpu(), dim=-1
            )
            means = features.reshape(len(COLORS), len(_TEMPLATES), -1).mean(1)
            self._colors[label] = torch.nn.functional.normalize(means, dim=-1)
        return self._colors[label]


def crop(image: Image.Image, found: Detection) -> Image.Image:
    """An object cut out of an RGB image, what is not of its mask in grey."""
    if found.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, _GREY), Image.fromarray(found.mask))
    left, top, right, bottom = found.box
    return image.crop((int(left), int(top), int(right), int(bottom)))
