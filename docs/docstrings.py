"""An extension of Griffe: makes Markdown of the docstrings, for the site's API pages."""

import re
from textwrap import indent

from griffe import Extension, Object


class Docstrings(Extension):
    """Writes formulas as code, escapes what would be HTML, links the names of functions.

    The section `Example:` becomes `Examples:`, under which name Griffe knows it.
    """

    def on_instance(self, *, obj: Object, **_: object) -> None:
        if obj.docstring:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(map(_markdown, paragraphs))


def _markdown(paragraph: str) -> str:
    if ">>>" in paragraph:
        return re.sub(r"^(\s*)Example:$", r"\1Examples:", paragraph, flags=re.M)
    if re.match(r"\w+ = ", paragraph):
        return indent(paragraph, "    ")
    paragraph = re.sub(r"(`[^`]*`)|<", lambda found: found[1] or "&lt;", paragraph)
    return re.sub(r"`(cosloss\.functional\.\w+)`", r"[`\1`][\1]", paragraph)
