"""The examples in the pages of the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(page):
    """The examples of a page, after empty lines, so that line numbers are those of the page."""
    text = page.read_text()
    for fence in FENCE.finditer(text):
        language, code = fence.groups()
        if language == "python":
            yield "\n" * text.count("\n", 0, fence.start(2)) + code


def from_example(page, name, **given):
    """The class or function that an example of a page defines. ``given`` are names it needs."""
    (block,) = [b for b in python_blocks(page) if re.search(rf"(class|def) {name}\b", b)]
    namespace = {"__name__": "example", **given}
    exec(compile(block, str(page), "exec"), namespace)
    return namespace[name]
