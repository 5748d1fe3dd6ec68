"""Pages of prose and code in several languages, which made-up text and made-up files are cut from.

They were written for this project. What they say does not matter; that they are sentences and programs does, for
networks of language answer random words by activations that no text causes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_SEPARATOR = "%% "
# A sentence ends behind a mark and white space; Chinese and Japanese have no space.
_SENTENCE = re.compile(r"(?<=[.!?؟।])\s+|(?<=[。？！])|\n\n+")


@dataclass(frozen=True)
class Passage:
    """A piece of text that belongs together.

    Attributes:
        kind: ``prose`` or ``code``.
        language: of prose (``en``, ``de``), or the suffix of such files (``py``, ``csv``).
        text: what it says.
    """

    kind: str
    language: str
    text: str

    @property
    def starts(self) -> list[int]:
        """Return where its sentences begin, in characters; those of code are its blocks between empty lines."""
        return [0, *(m.end() for m in _SENTENCE.finditer(self.text) if m.end() < len(self.text))]


@cache
def passages() -> tuple[Passage, ...]:
    """Return the pages that come with the package.

    >>> sorted({passage.kind for passage in passages()})
    ['code', 'prose']
    """
    text = (files("spa.calibration") / "passages.txt").read_text("utf-8")
    found = []
    for block in ("\n" + text).split("\n" + _SEPARATOR)[1:]:
        head, _, body = block.partition("\n")
        kind, language = head.split()
        found.append(Passage(kind=kind, language=language, text=body.rstrip("\n")))
    return tuple(found)


def passages_of(text: str) -> tuple[Passage, ...]:
    r"""Cut a user's text into passages: paragraphs between empty lines, or lines where there is no empty one.

    >>> [passage.text for passage in passages_of("One. Two.\n\nThree.")]
    ['One. Two.', 'Three.']
    """
    text = text.replace("\r\n", "\n").strip()
    parts = re.split(r"\n\s*\n", text) if re.search(r"\n\s*\n", text) else text.split("\n")
    return tuple(Passage(kind="prose", language="", text=part.strip()) for part in parts if part.strip())
