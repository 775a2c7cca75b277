"""A Markdown extension: formulas between dollars become MathML, which browsers draw unaided."""

import re

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor


class Formula(InlineProcessor):
    """A formula in a line, or one of its own."""

    def __init__(self, pattern: str, md: Markdown, display: str) -> None:
        super().__init__(pattern, md)
        self.display = display

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # noqa: N802
        # the converter takes a bare | for a relation, with spaces around it
        formula = re.sub(r"\|([^|]+)\|", r"\\left|\1\\right|", m[1])
        return self.md.htmlStash.store(convert(formula, display=self.display)), m.start(0), m.end(0)


class MathML(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        # before the escapes, at 180: a formula has backslashes of its own; code is at 190
        md.inlinePatterns.register(Formula(r"\$\$(.+?)\$\$", md, "block"), "display", 186)
        md.inlinePatterns.register(Formula(r"\$(?!\s)([^$]+?)(?<!\s)\$", md, "inline"), "math", 185)


def makeExtension(**options: object) -> MathML:  # noqa: N802
    return MathML(**options)
