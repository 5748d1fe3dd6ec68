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
_UNKNOWN_TOKENS = ("[UNK]", "<unk>", "<|unk|>")
_PROBE = "a"
FOREIGN = 1.5  # times as many tokens per word as in the language that a tokenizer knows best
UNKNOWN = 0.02  # fraction of a passage's tokens that may be unknown ones
CODE = 0.25  # of sequences begin with code, where there is prose, too
_LETTERS_PER_WORD = 1.6  # of languages that put no space between words


@dataclass(frozen=True)
class Corpus:
    """Text as token ids.

    Attributes:
        passages: the ids of each passage, without special tokens.
        starts: for each passage the positions at which sentences begin, the first of which is 0.
        before: the special tokens that begin a sequence.
        after: those that end it.
        padding: the id that fills a sequence up.
        weights: how often each passage is drawn; they sum to one.
        languages: those of the prose.
    """

    passages: tuple[np.ndarray, ...]
    starts: tuple[np.ndarray, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    padding: int = 0
    weights: np.ndarray | None = None
    languages: tuple[str, ...] = ()

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
        passages: the text. Those of which nothing is left are dropped, and prose in languages that the tokenizer
            does not know.
    """
    encodings = [tokenizer.encode(passage.text, add_special_tokens=False) for passage in passages]
    kept = _of_known_languages(passages, [e.ids for e in encodings], tokenizer)
    ids, starts = [], []
    for at in kept:
        # A token of byte-level BPE begins with the space before its word.
        begins = np.maximum.accumulate(np.asarray([begin for begin, _ in encodings[at].offsets]))
        begun = np.searchsorted(begins, np.asarray(passages[at].starts) - 1)
        ids.append(np.asarray(encodings[at].ids, np.int64))
        starts.append(np.unique(np.minimum(np.r_[0, begun[1:]], len(begins) - 1)))
    bare = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    full = tokenizer.encode(_PROBE, add_special_tokens=True).ids
    first = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return Corpus(
        passages=tuple(ids),
        starts=tuple(starts),
        before=tuple(full[:first]),
        after=tuple(full[first + len(bare) :]),
        padding=_first_id(tokenizer, _PADDING) or 0,
        weights=_weights(np.array([passages[at].kind == "code" for at in kept])),
        languages=tuple(dict.fromkeys(passages[at].language for at in kept if passages[at].kind == "prose")),
    )


def _first_id(tokenizer: Any, names: Sequence[str]) -> int | None:
    return next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)


def _weights(is_code: np.ndarray) -> np.ndarray:
    """Return weights that sum to one, of which code has its share where there is prose, too."""
    share = CODE if is_code.any() and not is_code.all() else 1.0
    weights = np.where(is_code, share / max(is_code.sum(), 1), (1 - share or 1.0) / max((~is_code).sum(), 1))
    return weights / max(weights.sum(), 1e-9)


def _of_known_languages(passages: Sequence[Passage], ids: Sequence[Sequence[int]], tokenizer: Any) -> list[int]:
    """Return the positions of the passages that the tokenizer's own text resembles.

    A tokenizer cuts the words of languages that it was not made of into many pieces, or does not know them.
    """
    unknown = _first_id(tokenizer, _UNKNOWN_TOKENS)
    known = [at for at, row in enumerate(ids) if row and row.count(unknown) <= UNKNOWN * len(row)]
    if not known:  # a user's text, say: better than none
        return [at for at, row in enumerate(ids) if row]
    tokens: dict[str, int] = {}
    words: dict[str, float] = {}
    for at in known:
        language = passages[at].language
        tokens[language] = tokens.get(language, 0) + len(ids[at])
        words[language] = words.get(language, 0) + _words(passages[at].text)
    prose = {passages[at].language for at in known if passages[at].kind == "prose"}
    per_word = {language: tokens[language] / words[language] for language in prose}
    fewest = min(per_word.values(), default=0)
    return [at for at in known if passages[at].kind != "prose" or per_word[passages[at].language] <= FOREIGN * fewest]


def _words(text: str) -> float:
    """Return about how many words a text has."""
    return max(len(text.split()), len(text) / (2 * 6), sum(c > "\u2e80" for c in text) / _LETTERS_PER_WORD)
