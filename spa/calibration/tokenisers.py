"""Tokenizers that lie beside a model, or are given: found, read by the ``tokenizers`` package, and applied to text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spa.calibration.passages import Passage
from spa.errors import PlanError
from spa.extras import extra

_READABLE = ("tokenizer.json", "vocab.txt", "vocab.json")  # in the order of preference
_PADDING = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")
_PROBE = "a"


@dataclass(frozen=True)
class Corpus:
    """Text as token ids.

    Attributes:
        passages: the ids of each passage, without special tokens.
        starts: for each passage the positions at which sentences begin, the first of which is 0.
        before: the special tokens that begin a sequence.
        after: those that end it.
        padding: the id that fills a sequence up.
    """

    passages: tuple[np.ndarray, ...]
    starts: tuple[np.ndarray, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    padding: int = 0

    @property
    def largest(self) -> int:
        """Return the largest id."""
        return max(self.padding, *self.before, *self.after, *(int(ids.max()) for ids in self.passages))


def find_tokenizer(folder: Path) -> Path | None:
    """Return the file of the tokenizer that lies in a model's folder, or in the one above it; None without any.

    Exporters write ``onnx/model.onnx`` below the folder of the tokenizer.
    """
    for place in (folder, folder.resolve().parent):
        for name in _READABLE:
            if (place / name).is_file() and (name != "vocab.json" or (place / "merges.txt").is_file()):
                return place / name
    return None


def read_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Read a tokenizer.

    Args:
        path: ``tokenizer.json``, the ``vocab.txt`` of WordPiece, or a ``vocab.json`` of byte-level BPE beside its
            ``merges.txt``; or a folder that holds one.

    Raises:
        PlanError: there is none, or it cannot be read.
        UnsupportedError: the ``tokenizers`` package is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = find_tokenizer(path) or path
    if not path.is_file():
        raise PlanError(f"{path}: there is no tokenizer. Give a {', '.join(_READABLE[:-1])} or {_READABLE[-1]}.")
    with extra("text"):
        import tokenizers  # noqa: F401 # asked for by name, so that the message names it
    readers: dict[str, Callable[[Path], Any]] = {".json": _from_json, ".txt": _from_word_pieces}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise PlanError(
            f"{path}: tokenizers of this form cannot be read. Give a tokenizer.json, which transformers' "
            "save_pretrained writes."
        )
    try:
        found = reader(path)
    except Exception as error:  # the package raises plain Exception
        raise PlanError(f"{path}: it cannot be read as a tokenizer ({error}). Give a tokenizer.json.") from error
    found.no_padding()
    found.no_truncation()
    return found


def _from_json(path: Path) -> Any:
    from tokenizers import Tokenizer

    if path.name != "vocab.json":
        return Tokenizer.from_file(str(path))
    from tokenizers.implementations import ByteLevelBPETokenizer

    return ByteLevelBPETokenizer(str(path), str(path.with_name("merges.txt")))


def _from_word_pieces(path: Path) -> Any:
    from tokenizers.implementations import BertWordPieceTokenizer

    config = path.with_name("tokenizer_config.json")
    lower = json.loads(config.read_text("utf-8")).get("do_lower_case") if config.is_file() else None
    if lower is None:  # a vocabulary without a capital letter was made of text without any
        lower = not any(w[0].isupper() for w in path.read_text("utf-8").split("\n") if w)
    return BertWordPieceTokenizer(str(path), lowercase=bool(lower))


def tokenise(tokenizer: Any, passages: Sequence[Passage]) -> Corpus:
    """Turn passages into token ids.

    Args:
        tokenizer: from :func:`read_tokenizer`.
        passages: the text; those of which nothing is left are dropped.
    """
    ids, starts = [], []
    for passage in passages:
        encoding = tokenizer.encode(passage.text, add_special_tokens=False)
        if not encoding.ids:
            continue
        ids.append(np.asarray(encoding.ids, np.int64))
        # A token of byte-level BPE begins with the space before its word.
        begins = np.asarray([begin for begin, _ in encoding.offsets])
        begun = np.searchsorted(np.maximum.accumulate(begins), np.asarray(passage.starts) - 1)
        starts.append(np.unique(np.minimum(np.r_[0, begun[1:]], len(encoding.ids) - 1)))
    bare = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    full = tokenizer.encode(_PROBE, add_special_tokens=True).ids
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    padding = next((i for i in map(tokenizer.token_to_id, _PADDING) if i is not None), 0)
    return Corpus(
        passages=tuple(ids),
        starts=tuple(starts),
        before=tuple(full[:at]),
        after=tuple(full[at + len(bare) :]),
        padding=padding,
    )
