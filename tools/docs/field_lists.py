"""An extension of griffe: this package's docstrings as Markdown.

They are prose with lists of fields, one a line, each with a hanging indent::

    ids:   token ids
    log_p: their log-probabilities,
           in nats
"""

from __future__ import annotations

import re

import griffe

_FIELD = re.compile(r"^(?P<name>[a-z_][\w, ]*): +(?P<text>\S.*)$")
_SECTIONS = re.compile(r"^(Args|Returns|Raises|Yields|Attributes|Examples?):$")


class FieldLists(griffe.Extension):
    """Rewrites each docstring as griffe finds it."""

    def on_object(self, *, obj: griffe.Object, **others) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """A list item for each field, no emphasis by the asterisk of a product, a colon for the two before a literal
    block. Sections that griffe reads, and literal blocks, stay as they are."""
    lines, in_section, hanging = [], False, None
    for line in docstring.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            in_section = bool(_SECTIONS.match(line))
        field = None if indent else _FIELD.match(line)
        if in_section or not line.strip():
            lines.append(line)
        elif field:
            if lines and lines[-1] and hanging is None:
                lines.append("")
            hanging = field.start("text")
            lines.append(f"- `{field['name']}`: {_escaped(field['text'])}")
        elif hanging is not None and indent >= 4:
            # The rest of a field; what is deeper is laid out by hand.
            lines.append(f"    {_escaped(line.strip())}")
            continue
        elif indent >= 4:
            lines.append(line)
        else:
            if hanging is not None:
                lines.append("")
            lines.append(_escaped(line[:-1] if line.endswith("::") else line))
        if not field:
            hanging = None
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return "".join(part if i % 2 else part.replace("*", r"\*") for i, part in enumerate(re.split(r"(`+[^`]*`+)", text)))
