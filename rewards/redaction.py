"""What may be printed: values of a config without their secrets, and text of other programs without control characters."""

import os
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

#: Stands for a secret.
HIDDEN = "***"
#: Characters of another program's text that are shown.
LONGEST = 2000
#: Characters from which on a token is looked for in texts; a shorter one is no secret and would be found in any word.
_LEAST = 4

#: Secrets of the entries that were loaded, at least so long that they are no usual words.
_LEAST_KNOWN = 6
_known: set[str] = set()

_WORD = r"(?:key|token|secret|password|passwd|passphrase|pwd|authorization|auth|credential|cookie)s?"
#: Names such as `api_key`, `HF_TOKEN`, `accessKeyId`; not `tokenizer` or `author`.
_SECRET_NAME = re.compile(rf"{_WORD}(?![a-z])")
#: Names such as `max_new_tokens`, `api_key_env`, `token_file`.
_PLAIN_NAME = re.compile(r"^(?:max|min|num|n)_|_(?:env|file|path)$")
#: Secrets that can be told by their look, and what they are replaced with.
_LOOKS = (
    (re.compile(r"(?<![\w-])(?:sk|pk|rk|xox[abprs])-[\w-]{8,}"), HIDDEN),
    (re.compile(r"(?<![A-Za-z0-9])(?:hf_|gh[oprsu]_|github_pat_|glpat-|AKIA|AIza)[\w-]{8,}"), HIDDEN),
    (re.compile(r"\b([Bb]earer)\s+(?!TOKEN\b)[\w.~+/=-]{4,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"\b([Bb]asic)\s+(?=\S*[A-Z0-9=])[\w+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"://[^/\s'\"]*@"), f"://{HIDDEN}@"),
    # Matched with or without a query, so that text of addresses alone takes no more than one look at each character.
    (re.compile(r"(https?://[^\s'\"?]*)(\?[^\s'\"]+)?"), lambda url: url[1] + (f"?{HIDDEN}" if url[2] else "")),
    (re.compile(rf"(?<![\w-])([\w-]*{_WORD}=['\"]?)[^\s'\",;&]+", re.IGNORECASE), rf"\1{HIDDEN}"),
)


def is_secret(name: Any) -> bool:
    """Whether a setting or variable of this name holds a secret."""
    separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).lower().replace("-", "_")
    return _SECRET_NAME.search(separated) is not None and _PLAIN_NAME.search(separated) is None


def redacted(value: Any) -> Any:
    """Return a value of a config as it may be printed, with ``***`` for each secret.

    Secret is what a key such as ``api_key`` or ``HF_TOKEN`` names, every value under ``variables``, and what looks like
    a secret (``sk-...``, ``Bearer ...``, the user of a URL), or was remembered as one, in any text. Other names, numbers
    and text stay.
    """
    if isinstance(value, Mapping):
        return {redacted(key): _redacted_entry(key, content) for key, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    if not isinstance(value, str):
        return value
    for secret in sorted(_known, key=len, reverse=True):  # a longer one may contain a shorter one
        value = value.replace(secret, HIDDEN)
    for look, replacement in _LOOKS:
        value = look.sub(replacement, value)
    return value


def remember_secrets(entry: Any, name: Any = "") -> None:
    """Remember the secrets in a reward's entry, so that no text shows them: what it raises may quote its arguments."""
    if isinstance(entry, Mapping):
        for key, value in entry.items():
            remember_secrets(value, name if is_secret(name) else key)
    elif isinstance(entry, (list, tuple)):
        for value in entry:
            remember_secrets(value, name)
    elif is_secret(name):
        text = os.environ.get(str(name), "") if entry is None else str(entry)  # one without a value is that of the run
        _known.update([text] if len(text) >= _LEAST_KNOWN else [])


def _redacted_entry(key: Any, content: Any) -> Any:
    if content is None or isinstance(content, bool):
        return content
    if key == "variables":
        return dict.fromkeys(content, HIDDEN) if isinstance(content, Mapping) else HIDDEN
    return HIDDEN if is_secret(key) else redacted(content)


def located(error: Any) -> str:
    """Describe what is wrong with a YAML file, and where, without the line itself, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return redacted(getattr(error, "problem", None) or type(error).__name__) + place


def foreign(text: str, *secrets: str | None, longest: int = LONGEST) -> str:
    """Return text of another program as it may be shown: no control characters, no secrets, not endless.

    Line breaks stay, and the lines after the first are indented, so that none looks like a line of the log.

    Args:
        secrets: what that program was sent, which it may repeat.
    """
    for secret in secrets:
        if secret and len(secret) >= _LEAST:
            text = text.replace(secret, HIDDEN)
    cut = len(text) - longest
    shown = redacted(text[: 2 * longest])[:longest]  # a secret that is cut may no longer look like one
    lines = "".join(map(_escaped, shown)).split("\n")
    indented = [lines[0], *(line if line.startswith("  ") else f"  {line}" for line in lines[1:])]
    return "\n".join(indented) + (f" ... ({cut} more characters)" if cut > 0 else "")


def _escaped(character: str) -> str:
    if character == "\n" or character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return "  " if character == "\t" else character.encode("unicode_escape").decode()
