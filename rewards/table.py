"""The table of built-in rewards. It holds names only, so that nothing is imported before a run asks for it."""

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Builtin:
    """An entry of the table.

    target: ``module:attr``. about: what it measures, in one line. factory: whether the attr is called once, with the
    config's ``args`` or none, and returns the reward. columns: the data columns it takes by default, with "?" after one
    that may be missing. packages: packages it needs besides this library's own dependencies. extra: the optional
    dependencies of this distribution that include them. checkpoints: the files it loads by default, each
    ``owner/name:file`` or ``owner/name`` on the hub.
    """

    target: str
    about: str
    factory: bool = False
    columns: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    extra: str | None = None
    checkpoints: tuple[str, ...] = ()


BUILTINS = {
    # For the embedded tiny world, measured from pixels: the data column `spec` describes what the image should show.
    "shapes_following": Builtin(
        "rewards.shapes:shapes_following", "mean grade, 0 to 1, of the parts of the prompt", columns=("spec",)
    ),
    "shapes_exact": Builtin(
        "rewards.shapes:shapes_exact", "1 if the image shows all that the prompt says", columns=("spec",)
    ),
    "shapes_word": Builtin("rewards.shapes:shapes_word", "letter accuracy of the word, 0 to 1", columns=("spec",)),
    "shapes_preference": Builtin(
        "rewards.shapes:preference",
        "1 if an attribute has a preferred value (args: attribute, values)",
        True,
        ("spec",),
    ),
    "grounded": Builtin("rewards.shapes:grounded", "1 if there is a strip of ground along the bottom"),
    "warm_background": Builtin(
        "rewards.shapes:warm_background", "1 if the prompt is followed on a red or yellow background", columns=("spec",)
    ),
    # For any image, without a model.
    "jpeg_size": Builtin(
        "rewards.simple:jpeg_size", "size as a JPEG in kilobytes (args: prefer small or large)", factory=True
    ),
    "brightness": Builtin("rewards.simple:brightness", "mean luma, 0 to 1"),
    "ocr": Builtin(
        "rewards.text.ocr:Ocr",
        "how well the image renders the wanted text, English and Chinese",
        factory=True,
        columns=("text?",),
        packages=("rapidocr", "onnxruntime"),
        extra="ocr",
    ),
    "geneval": Builtin(
        "rewards.geneval.reward:GenEval",
        "GenEval's rules: objects, counts, colours, positions (not the official detector)",
        factory=True,
        columns=("tag", "include", "exclude?"),
        checkpoints=("facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"),
    ),
    "vlm_judge": Builtin(
        "rewards.judge.vlm:VlmJudge",
        "marks from a vision-language model at an OpenAI-compatible endpoint (args: model, base_url)",
        factory=True,
    ),
    # Learned from human preferences, or from images and their captions.
    "hpsv2": Builtin(
        "rewards.learned.hpsv2:hpsv2",
        "human preference, HPSv2.1 or 2.0; about 0.2 to 0.4",
        factory=True,
        packages=("ftfy",),
        extra="rewards",
        checkpoints=("xswu/HPSv2:HPS_v2.1_compressed.pt", "openai/clip-vit-large-patch14"),
    ),
    "imagereward": Builtin(
        "rewards.learned.imagereward:imagereward",
        "human preference, ImageReward; about -2 to 2",
        factory=True,
        checkpoints=("THUDM/ImageReward:ImageReward.pt", "google-bert/bert-base-uncased"),
    ),
    "pickscore": Builtin(
        "rewards.learned.pickscore:PickScore",
        "human preference, PickScore / 26; near 0.8",
        factory=True,
        checkpoints=("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    ),
    "clipscore": Builtin(
        "rewards.learned.clipscore:ClipScore",
        "agreement of image and prompt in CLIP, 100 x cosine; about 15 to 35",
        factory=True,
        checkpoints=("openai/clip-vit-large-patch14",),
    ),
    "aesthetic": Builtin(
        "rewards.learned.aesthetic:Aesthetic",
        "aesthetics without regard to the prompt, LAION's predictor; about 1 to 10",
        factory=True,
        checkpoints=("trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth", "openai/clip-vit-large-patch14"),
    ),
}


def require_packages(name: str) -> None:
    """Raise ImportError, saying what to install, if a package that a built-in needs is missing."""
    builtin = BUILTINS[name]
    missing = [package for package in builtin.packages if importlib.util.find_spec(package) is None]
    if missing:
        install = f'pip install "flow-align[{builtin.extra}]"' if builtin.extra else f"pip install {' '.join(missing)}"
        raise ImportError(f"reward {name!r} needs the package {', '.join(missing)}, which is not installed: {install}")
