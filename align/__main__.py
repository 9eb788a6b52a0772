"""The command ``flow-align``: every door by its name, and what the package brings along.

flow-align grpo --config tiny/grpo
"""

import os
import sys
from importlib import import_module

#: Each command, the module whose ``main`` runs it, and a line about it.
COMMANDS = {
    "grpo": ("align.grpo", "GRPO on your rewards"),
    "nft": ("align.nft", "DiffusionNFT on your rewards"),
    "dpo": ("align.dpo", "DPO on preferences"),
    "dpo_online": ("align.dpo_online", "DPO on pairs of the model's own images, ranked by your rewards"),
    "sft": ("align.sft", "fine-tuning on captioned images"),
    "generate": ("align.generate", "sample images; with rewards, score and rank them"),
    "rewards": ("rewards.__main__", "list the built-in rewards, score images by them, serve them over HTTP"),
    "inspect": ("align.cli.inspection", "describe training data, and draw pairs of it"),
    "configs": ("align.cli.configs", "list the shipped configs, or print the path of one"),
}


def usage() -> str:
    """Return what ``flow-align --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flow-align COMMAND [OPTIONS]      (each command has --help)",
            "",
            *lines,
            "",
            "to begin: flow-align grpo --config tiny/grpo",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0].replace("-", "_") if words and not words[0].startswith("-") else ""
    if name not in COMMANDS:
        if not words or words[0] in ("-h", "--help"):
            print(usage())
            return 0
        from align.models.loading import nearest  # imports torch: not for a command that is known

        print(f"error: unknown command {words[0]!r}." + nearest(name, list(COMMANDS)), file=sys.stderr)
        return 2
    try:
        code = import_module(COMMANDS[name][0]).main(words[1:]) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read it has seen enough: `flow-align configs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
