"""The built-in rewards: a literal table, so that nothing is imported before a run asks for it."""

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Builtin:
    """An entry of the table.

    target: ``module:attr``. about: what it measures, one line. factory: the attr is called once, with the config's
    ``args`` or without any, and returns the reward. columns: the data columns it takes, as its defaults are; "?" behind
    one that may be missing. packages: what must be importable, beyond the library's own needs. extra: the optional
    dependencies of this distribution that bring them. checkpoints: the files it loads by default, each
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
    # Of the embedded world, measured from pixels: the data column `spec` says what is to be seen.
    "shapes_following": Builtin(
        "rewards.shapes:shapes_following", "share of what the prompt says that is to be seen", columns=("spec",)
    ),
    "shapes_exact": Builtin(
        "rewards.shapes:shapes_exact", "1 where all that the prompt says is to be seen", columns=("spec",)
    ),
    "shapes_word": Builtin(
        "rewards.shapes:shapes_word", "share of the word's letters that are right", columns=("spec",)
    ),
    "shapes_preference": Builtin(
        "rewards.shapes:preference",
        "1 where an attribute has a wanted value (args: attribute, values)",
        True,
        ("spec",),
    ),
    "grounded": Builtin("rewards.shapes:grounded", "1 where all stands on a strip of ground"),
    "warm_background": Builtin(
        "rewards.shapes:warm_background", "1 where the prompt is followed on red or yellow", columns=("spec",)
    ),
    # Of any picture, without a model.
    "jpeg_size": Builtin("rewards.simple:jpeg_size", "kilobytes as a JPEG, small or large wanted", factory=True),
    "brightness": Builtin("rewards.simple:brightness", "mean luma, 0 to 1"),
    "ocr": Builtin(
        "rewards.text.ocr:Ocr",
        "how much of the wanted text can be read, English and Chinese",
        factory=True,
        columns=("text?",),
        packages=("rapidocr", "onnxruntime", "rapidfuzz"),
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
        "marks by a vision-language model at an OpenAI-compatible endpoint (args: model, base_url)",
        factory=True,
    ),
    # Learned from what people preferred, or from pictures and their texts.
    "hpsv2": Builtin(
        "rewards.learned.hpsv2:hpsv2",
        "which picture of a prompt people prefer, HPSv2.1 or 2.0; about 0.2 to 0.4",
        factory=True,
        packages=("ftfy",),
        extra="rewards",
        checkpoints=("xswu/HPSv2:HPS_v2.1_compressed.pt", "openai/clip-vit-large-patch14"),
    ),
    "imagereward": Builtin(
        "rewards.learned.imagereward:imagereward",
        "which picture of a prompt people prefer, ImageReward; about -2 to 2",
        factory=True,
        checkpoints=("THUDM/ImageReward:ImageReward.pt", "google-bert/bert-base-uncased"),
    ),
    "pickscore": Builtin(
        "rewards.learned.pickscore:PickScore",
        "which picture of a prompt people pick, PickScore / 26; near 0.8",
        factory=True,
        checkpoints=("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    ),
    "clipscore": Builtin(
        "rewards.learned.clipscore:ClipScore",
        "how near picture and prompt are in CLIP, 100 x cosine; about 15 to 35",
        factory=True,
        checkpoints=("openai/clip-vit-large-patch14",),
    ),
    "aesthetic": Builtin(
        "rewards.learned.aesthetic:Aesthetic",
        "how much people like a picture, LAION's predictor; about 1 to 10",
        factory=True,
        checkpoints=("trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth", "openai/clip-vit-large-patch14"),
    ),
}


def require(name: str) -> None:
    """Raise ImportError, with what to install, where a package that a built-in needs is missing."""
    builtin = BUILTINS[name]
    missing = [package for package in builtin.packages if importlib.util.find_spec(package) is None]
    if missing:
        install = f'pip install "flow-align[{builtin.extra}]"' if builtin.extra else f"pip install {' '.join(missing)}"
        raise ImportError(f"reward {name!r} needs the package {', '.join(missing)}, which is not installed: {install}")
