"""What the manual's build does beside MkDocs: equations as MathML, and docstrings as the pages want them.

MkDocs calls :func:`on_page_content`; mkdocstrings loads :class:`Docstrings`, an extension of Griffe.
"""

import ast
import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

#: What pymdownx.arithmatex leaves of an equation, in a line of text and on a line of its own.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
#: What stays in one line: an option with its value, and a name that is all of a row's first cell.
_ONE_LINE = re.compile(r"<code>(?=--\w+(?: \w+)?</code>)|(?<=<tr>\n<td>)<code>(?=[\w.]{1,28}</code></td>)")
#: The first cell of a row that begins with a message, which needs room.
_MESSAGE = re.compile(r"(?<=<tr>\n)<td>(?=<code>[^<]{30})")
#: A Sphinx role: its name, and what it names.
_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`(~?)([^`]+)`")
#: Functions that make a dataclass field from its default and its line of help.
_FIELD_MAKERS = ("setting", "field")


def on_page_content(content: str, **_: Any) -> str:
    """Turn a page's LaTeX into MathML, which browsers draw without a script or a font; mark names and messages."""
    content = _INLINE.sub(lambda match: convert(html.unescape(match[1])), content)
    content = _ONE_LINE.sub('<code class="one-line">', _MESSAGE.sub('<td class="message">', content))
    return _DISPLAY.sub(lambda match: convert(html.unescape(match[1]), display="block"), content)


class Docstrings(griffe.Extension):
    """Sphinx roles become links of mkdocs-autorefs; a setting shows its default, and its line of help as docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one object before its docstring is parsed."""
        if isinstance(obj, griffe.Attribute) and obj.value is not None:
            _show_setting(obj, str(obj.value))
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda role: _link(obj, *role.groups()), obj.docstring.value)


def _link(obj: griffe.Object, short: str, name: str) -> str:
    """A link that stays plain text where the manual has no such object; names are looked up from ``obj`` outwards."""
    try:
        identifier = obj.resolve(name)
    except griffe.NameResolutionError:  # a full name, or one of another library
        identifier = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{identifier}"><code>{shown}</code></autoref>'


def _show_setting(attribute: griffe.Attribute, value: str) -> None:
    """Split ``setting(default, help)`` or ``field(default=..., metadata={"help": ...})``; leave other values alone."""
    call = ast.parse(value, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in _FIELD_MAKERS:
        return
    given = dict(zip(("default", "help"), call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
    metadata = given.get("metadata")
    if isinstance(metadata, ast.Dict):
        given |= {_text(key): entry for key, entry in zip(metadata.keys, metadata.values, strict=True) if key}
    if "help" not in given:
        return
    attribute.value = ast.unparse(given["default"]) if "default" in given else None
    if attribute.docstring is None:
        attribute.docstring = griffe.Docstring(_text(given["help"]), parent=attribute)


def _text(node: ast.expr) -> str:
    """A string as it is written, what an f-string inserts included."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ast.unparse(node)[2:-1] if isinstance(node, ast.JoinedStr) else ""
