"""The manual: it builds without a warning, and what it names is there."""

import argparse
import ast
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers.hf_argparser
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from trl import TrlParser

import align.cli.inspection
import rewards.__main__
import rewards.serve
from align.__main__ import usage
from align.cli.arguments import ModelArguments, OptionParser, how_to_begin, resolve_dataset
from align.cli.data import DataArguments
from align.cli.images import CaptionedDataArguments, PreferenceDataArguments
from align.dpo import DPOConfig
from align.dpo_online import OnlineDPOConfig
from align.engine.settings import FlowConfig, values_of
from align.generate import GenerateArguments
from align.grpo import GRPOConfig
from align.nft import NFTConfig
from align.sft import SFTConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ("align", "rewards", "preference_data")
#: What each door's command line is made of.
DOORS = {
    "sft": (CaptionedDataArguments, ModelArguments, SFTConfig),
    "dpo": (PreferenceDataArguments, ModelArguments, DPOConfig),
    "dpo_online": (DataArguments, ModelArguments, OnlineDPOConfig),
    "grpo": (DataArguments, ModelArguments, GRPOConfig),
    "nft": (DataArguments, ModelArguments, NFTConfig),
    "generate": (GenerateArguments, ModelArguments),
}
#: In the table of what a resume must not change, each algorithm's config.
CONFIGS = {
    "SFT": SFTConfig,
    "DPO": DPOConfig,
    "online DPO": OnlineDPOConfig,
    "GRPO": GRPOConfig,
    "DiffusionNFT": NFTConfig,
}
#: A command that is shown to fail by an option or a value which nobody knows, and what it says.
MISTAKE = re.compile(r"^\$ .*\nerror: (?:unknown option|argument|config file) .*$", re.MULTILINE)
#: Options of other programs: `ruff format --check`, Slurm's `srun --signal`, musubi-tuner's `convert_lora.py`.
OTHERS = {"check", "signal", "input", "output", "target"}
#: In a quoted message, what differs (capitals and dots), and where the code puts it together from several texts.
DIFFERS = re.compile(
    r"\.\.\.|checkpoint\.json|model_index\.json|\b[A-Z][A-Z_]*\b|(?<=was written:)|(?<=MiB were free)"
    r"|(?<=the last N rollouts )|(?<=fit this run:)|positive(?=, found)"
)
#: Files of others whose messages reach the user of a command.
SPEAK_TOO = (Path(argparse.__file__), Path(transformers.hf_argparser.__file__))
OPTION = re.compile(r"(?<![\w-])--([a-z]\w*)")
ROW = re.compile(r"^\| `--(\w+)` \| ([^|]*) \|", re.MULTILINE)


def identify(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def defaults() -> dict[str, dict[str, object]]:
    """Of each door: its options, with their defaults."""
    return {
        door: {word[2:]: action.default for action in TrlParser(types)._actions for word in action.option_strings}
        for door, types in DOORS.items()
    }


def printed_options(capsys, command, *words: str) -> set[str]:
    """The options in what a command prints for ``--help``."""
    with pytest.raises(SystemExit) as ended:
        command([*words, "--help"])
    assert not ended.value.code
    return set(OPTION.findall(capsys.readouterr().out))


def words_of(parser) -> set[str]:
    return {word.lstrip("-").replace("-", "_") for action in parser._actions for word in action.option_strings}


def test_manual_builds_without_a_warning_and_reads_without_a_network(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / ".mkdocs.yml", "-d", tmp_path]
    built = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert "arithmatex" not in text, f"{page.name} has an equation that is no MathML"
        assert not re.findall(r'<(?:script|img|iframe)[^>]* src="https?:', text), page.name
        assert not re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|preload)"[^>]*href="https?:', text), page.name
    assert "<math" in (tmp_path / "algorithms" / "grpo.html").read_text()
    assert "group_advantages" in (tmp_path / "reference" / "maths.html").read_text()


def test_every_option_named_is_one(capsys, defaults):
    known = {"config", *OTHERS, *(option for options in defaults.values() for option in options)}
    known |= words_of(launch_command_parser()) | words_of(get_args_parser())
    known |= printed_options(capsys, rewards.serve.main) | printed_options(capsys, align.cli.inspection.main)
    for command in ("list", "score"):
        known |= printed_options(capsys, rewards.__main__.main, command)
    for script in [*(ROOT / "tests/bench").glob("*.py"), ROOT / "align/tiny/build.py"]:
        known |= set(re.findall(r'"--(\w+)"', script.read_text()))
    named = {(identify(page), o) for page in PAGES for o in OPTION.findall(MISTAKE.sub("", page.read_text()))}
    assert not {f"{page}: --{option}" for page, option in named if option not in known}


@pytest.mark.parametrize("page", [*(ROOT / "docs/algorithms").glob("*.md"), ROOT / "docs/running.md"], ids=identify)
def test_defaults_in_the_tables_are_those_of_the_code(page, defaults):
    doors = {"dpo": ("dpo", "generate"), "running": tuple(DOORS)}.get(page.stem, (page.stem,))
    rows = ROW.findall(page.read_text())
    assert rows
    for option, shown in rows:
        found = [defaults[door][option] for door in doors if option in defaults[door]]
        assert found, f"--{option} is no option of {doors}"
        if shown.strip():
            assert any(same(shown.strip(), default) for default in found), f"--{option}: {shown}, not {found}"


def same(shown: str, default: object) -> bool:
    """Whether a table's cell means this default."""
    if default is None or isinstance(default, bool):
        return shown == str(default).lower()
    if isinstance(default, (int, float)):
        return re.fullmatch(r"[\d.e-]+", shown) is not None and float(shown) == default
    return shown.strip('"') == str(default)


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_files_and_configs_named_exist(page):
    text = MISTAKE.sub("", page.read_text())
    if page.name == "CHANGELOG.md":  # names what was, too
        return
    for name in re.findall(
        r"(?<![\w/.-])((?:configs|tests|docs|align|preference_data)/[\w./-]*\w|rewards/\w+\.py)", text
    ):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"(?<![\w/-])((?:tiny|qwen_image|accelerate)/[a-z_0-9]+)\b(?![./])", text):
        if not (ROOT / "configs" / f"{name}.yaml").is_file():
            resolve_dataset(name)  # raises unless it is one of the embedded data sets
            assert name.startswith("tiny/"), name


def named_in(page: Path) -> str:
    """What stands in backticks and in blocks of code; of the changelog's tables, without what was."""
    text = page.read_text()
    if page.name == "CHANGELOG.md":
        text = re.sub(r"^\|[^|]*", "", text, flags=re.MULTILINE)
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_modules_and_what_is_in_them_exist(page):
    for name in re.findall(rf"(?<![\w./])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z]\w*)+", named_in(page)):
        pkgutil.resolve_name(name)  # imports, then looks for attributes; raises where there is nothing


@pytest.fixture(scope="module")
def sources() -> str:
    ours = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return "\n".join(file.read_text() for file in (*ours, *SPEAK_TOO))


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_classes_named_are_in_the_code(page, sources):
    for name in re.findall(r"\b[A-Z]+[a-z]+[A-Z]\w*\b", named_in(page)):
        assert re.search(rf"\b{name}\b", sources), name


def test_what_a_resume_must_not_change_is_listed(tmp_path):
    text = (ROOT / "docs/running.md").read_text().split("### What a resume must not change")[1]
    table = re.search(r"\| algorithm \| fixed settings \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
    rows = [row.strip("| ").split(" | ") for row in table[1].splitlines()]
    for algorithm, config in CONFIGS.items():
        listed = [
            name
            for of, names in rows
            for name in re.findall(r"`(\w+)`", names)
            if of == "every algorithm" or algorithm in of.split(", ")
        ]
        args: FlowConfig = config(output_dir=str(tmp_path), use_cpu=True)
        assert sorted(listed) == sorted(values_of(args, fixed_on_resume=True)), algorithm


def test_output_shown_is_what_is_printed():
    running = (ROOT / "docs/running.md").read_text()
    groups = [group.title for group in OptionParser(DOORS["grpo"])._action_groups if "(" in str(group.title)]
    assert len(groups) > 5
    for text in (usage(), how_to_begin("grpo"), "\n".join(f"{title}:" for title in groups)):
        assert f"{text}\n```" in running
    for page in ("quickstart.md", "zh/quickstart.md"):
        assert f"```\n{how_to_begin('sft')}\n```" in (ROOT / "docs" / page).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=identify)
def test_python_examples_run(page, tmp_path):
    """One after the other, in one folder: an example may use what the one before it has left there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        done = subprocess.run(
            [sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name == "README.md" or p.parent.name == "zh"], ids=identify)
def test_relative_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert links
    for link in links:
        target, _, anchor = link.partition("#")
        assert (page.parent / target).is_file(), link
        assert not anchor, f"{link}: the test does not look for anchors"


def literals() -> list[str]:
    """Every text in the packages, as :func:`plain` makes it; what is inserted into a text is left out."""
    found = []
    ours = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    for file in (*ours, *SPEAK_TOO):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(v.value for v in node.values if isinstance(v, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(?:\(\w+\))?[-.\d]*[a-z]", "\0", node.value).replace("%%", "%"))
    return [plain(text) for text in found]


def plain(text: str) -> str:
    """Without quotes, and with single spaces: a quoted message differs in these."""
    return re.sub(r"\s+", " ", re.sub(r"[`'\"]", "", text))


def test_messages_quoted_are_in_the_code():
    text = (ROOT / "docs/faults.md").read_text()
    cells = [row.split(" | ")[0] for row in re.findall(r"^\| (`.*)$", text, re.MULTILINE)]
    messages = [m for cell in cells for m in re.findall(r"`([^`]+)`", cell)] + re.findall(
        r"```\n(.*?)```", text, re.DOTALL
    )
    assert len(messages) > 100
    there = "\n".join(literals())
    missing = []
    for message in messages:
        pieces = [piece.strip(" .:,;()[]%|") for piece in DIFFERS.split(plain(message))]
        missing += [(piece, message) for piece in pieces if piece not in there]
    assert not missing
