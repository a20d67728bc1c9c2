"""The documents and labelled questions of the benches of retrieval: docs/, a book, and cookbook/data/questions.json.

The book is Lewis Carroll's Alice's Adventures in Wonderland (public domain), from the test data of Brotli 1.2.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from langchain_text_splitters import RecursiveCharacterTextSplitter

ROOT = Path(__file__).parents[1]
DATA = ROOT / "cookbook" / "data"
LEFT_OUT = {"rag.md", "commands.md"}
"""Pages that are no documents of the questions: the one about retrieval, and one that a program writes."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A part of a document.

    Args:
        source: Name of the file.
        text: The part.
    """

    source: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, and how to know the passage that answers it.

    Args:
        text: The question.
        source: Name of the file that answers it.
        phrase: A part of the passage, which occurs once in the file.
        answers: Words of which a right answer has one.
    """

    text: str
    source: str
    phrase: str
    answers: tuple[str, ...]

    def is_answered_by(self, passage: Passage) -> bool:
        """Whether a passage holds the answer."""
        return passage.source == self.source and plain(self.phrase) in plain(passage.text)


def plain(text: str) -> str:
    """Return a text in lower case with single spaces, so that lines that are broken elsewhere compare equal."""
    return re.sub(r"\s+", " ", text).strip().lower()


def documents() -> dict[str, str]:
    """Return the texts of all documents by the names of their files."""
    files = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in LEFT_OUT]
    return {path.name: path.read_text(encoding="utf-8") for path in [*files, DATA / "alice.txt"]}


def passages(*, size: int = 800, overlap: int = 100) -> list[Passage]:
    """Cut the documents into passages.

    Args:
        size: Most characters of one.
        overlap: Characters that two neighbours share.
    """
    splitter = RecursiveCharacterTextSplitter(chunk_size=size, chunk_overlap=overlap)
    return [Passage(source=name, text=part) for name, text in documents().items() for part in splitter.split_text(text)]


def questions() -> list[Question]:
    """Return the labelled questions."""
    entries = json.loads((DATA / "questions.json").read_text(encoding="utf-8"))
    return [
        Question(text=e["question"], source=e["source"], phrase=e["phrase"], answers=tuple(e["answer"]))
        for e in entries
    ]


def hit_rate(asked: Sequence[Question], found: Sequence[Sequence[Passage]], k: int) -> float:
    """Return the share of the questions with the answering passage among the first `k` that were found."""
    hits = [any(map(question.is_answered_by, list(rows)[:k])) for question, rows in zip(asked, found, strict=True)]
    return sum(hits) / len(hits)
