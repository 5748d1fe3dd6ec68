"""Made-up files, byte by byte: prose, source, tables, pictures, archives and programs.

Networks that read the bytes of files learn nothing from random ones, for almost no file looks like that: text has some
ninety values, binary formats have headers, strings and runs of zeros. Files are made of the pages that come with the
package, by the libraries that write such files, as far as Python and Pillow have them.
"""

from __future__ import annotations

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import re
import struct
import tarfile
import wave
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from itertools import count as counted

import numpy as np
from PIL import Image

from spa.calibration.leaves import dead_leaves
from spa.calibration.passages import passages
from spa.running.feeds import Recipe

Rng = np.random.Generator
VALUES = range(256, 261)  # of inputs that hold bytes: one of padding, perhaps others that begin and end a file
SHORTEST_FILE = 32
LONGEST_SHARE = 8.0  # lengths of files are from a sixteenth of the window to this many of it
RENAMED = 0.3  # fraction of the names in source that are replaced
SPLIT = 0.5  # fraction of windows that show the beginning and the end of a file instead of its beginning alone
KEYWORDS = frozenset(
    "include return import from class static void const struct function async await while public private package null "
    "true false else NULL throw catch final enum match SELECT WHERE FROM CREATE TABLE INSERT INTO GROUP ORDER echo "
    "done then html head body link script table name file http https xmlns begin section item document".split()
)
DOCUMENTS = ("rst", "md", "tex", "html")
PICTURES = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM")
_COMMENTS = {
    "#": ("py", "sh", "yaml", "rb", "pl", "mk", "cmake", "toml", "po", "s"),
    "--": ("sql", "lua"),
    "%": ("tex", "m"),
    ";": ("ini", "lisp"),
    "!": ("f90",),
    "..": ("rst",),
    "REM": ("bat",),
}
# Frequent instructions of x86-64; a question mark stands for any byte.
_INSTRUCTIONS = (
    b"\x55 \x48\x89\xe5 \xc3 \xe8??\xff\xff \xe8??\x00\x00 \x48\x8b\x45? \x48\x89\x7d? \x48\x83\xec? \x48\x83\xc4? "
    b"\x5d \x31\xc0 \x85\xc0 \x74? \x75? \xeb? \x48\x8d\x3d??\x00\x00 \x0f\x84??\x00\x00 \x89\xc7 \x41\x54 \x5b \x90 "
    b"\x66\x90 \xf3\x0f\x1e\xfa \x48\x85\xc0 \x4c\x89\xe6 \xff\x25??\x00\x00 \x0f\xb6\x00 \xb8?\x00\x00\x00"
).split(b" ")


def byte_files(count: int, length: int, values: int, rng: Rng) -> np.ndarray:
    """Make up windows of files.

    Args:
        count: the number of files.
        length: bytes of each that are seen: its first, or the first half of them and the last.
        values: the exclusive bound of values; what lies beyond a file is 256 where that is one, else 0.
        rng: the source of randomness.

    Returns:
        int64 of shape (count, length).

    >>> made = byte_files(4, 64, 257, np.random.default_rng(0))
    >>> made.shape, int(made.max()) <= 256, int(made.min()) >= 0
    ((4, 64), True, True)
    """
    windows = np.full((count, length), 256 if values > 256 else 0, np.int64)
    makers = tuple(_MAKERS)
    for window in windows:  # files have nothing in common that could be made at once
        size = int(length * 2 ** rng.uniform(-4, np.log2(LONGEST_SHARE)))
        content = makers[int(rng.choice(len(makers), p=_SHARES))](max(size, 16), rng)
        data = np.frombuffer(content, np.uint8)
        if rng.random() < SPLIT:
            half = length // 2
            first, last = data[:half], data[-(length - half) :]
            window[: len(first)] = first
            window[length - len(last) :] = last
        else:
            window[: len(data)] = data[:length]
    return windows


# -- text ----------------------------------------------------------------------------------------------------------


@cache
def _words() -> list[str]:
    return sorted({w for p in passages() for w in re.findall(r"[A-Za-z_]{3,}", p.text)})


def _word(rng: Rng) -> str:
    return _words()[int(rng.integers(len(_words())))]


def _repeated(size: int, part: Callable[[], str], between: str = "\n") -> str:
    """Join parts until there are enough characters."""
    parts: list[str] = []
    length = 0
    while length < size:
        parts.append(part())
        length += len(parts[-1]) + len(between)
    return between.join(parts)


def _renamed(text: str, rng: Rng) -> str:
    """Replace some words, all occurrences of one by the same word, as another program would have others."""
    names: dict[str, str] = {}

    def other(match: re.Match[str]) -> str:
        word = match.group()
        if word not in names:
            names[word] = _word(rng) if word not in KEYWORDS and rng.random() < RENAMED else word
        return names[word]

    return re.sub(r"\b[A-Za-z_]{4,}\b", other, text)


def _prose(size: int, rng: Rng) -> bytes:
    pages = [p for p in passages() if p.kind == "prose"]
    language = pages[int(rng.integers(len(pages)))].language
    pages = [p for p in pages if p.language == language]
    texts = [p.text for p in pages]
    if rng.random() < 0.4:  # with headings, lists and links
        form = DOCUMENTS[int(rng.integers(len(DOCUMENTS)))]
        marked = [_renamed(p.text, rng) for p in passages() if p.language == form and p.kind == "code"]
        texts += [part for page in marked for part in page.split("\n\n")]
    between = "\n\n" if rng.random() < 0.7 else " "
    text = _repeated(size, lambda: texts[int(rng.integers(len(texts)))], between)
    if rng.random() < 0.3:
        text = re.sub(r"(.{40,70}) ", r"\1\n", text)
    if rng.random() < 0.1:
        return text.encode("utf-16")
    return text.replace("\n", "\r\n").encode() if rng.random() < 0.1 else text.encode()


def _source(size: int, rng: Rng) -> bytes:
    kinds = sorted({p.language for p in passages() if p.kind == "code"})
    language = kinds[int(rng.integers(len(kinds)))]
    pages = [p.text for p in passages() if p.kind == "code" and p.language == language]
    text = _repeated(size, lambda: _renamed(pages[int(rng.integers(len(pages)))], rng), "\n\n")
    if rng.random() < 0.3:
        text = text.replace("    ", "\t")
    if rng.random() < 0.2:  # a licence, as files begin with
        mark = next((m for m, languages in _COMMENTS.items() if language in languages), "//")
        head = _prose(300, np.random.default_rng(rng.integers(1 << 32))).decode("utf-8", "ignore")
        text = "\n".join(f"{mark} {line}" for line in re.sub(r"(.{40,70}) ", r"\1\n", head).split("\n")) + "\n" + text
    return text.encode()


def _table(size: int, rng: Rng) -> bytes:
    columns = int(rng.integers(2, 12))
    kinds = rng.integers(0, 4, columns)
    file = io.StringIO()
    writer = csv.writer(file, delimiter=",;\t|"[int(rng.integers(4))])
    writer.writerow([_word(rng) for _ in range(columns)])
    for row in counted():
        number = rng.lognormal(2, 2, columns)
        cells = [(f"{n:.3f}", int(n), _word(rng), row)[kind] for n, kind in zip(number, kinds, strict=True)]
        writer.writerow(cells)
        if file.tell() >= size:
            break
    return file.getvalue().encode()


def _thing(depth: int, rng: Rng) -> object:
    kind = int(rng.integers(0, 7)) if depth < 4 else int(rng.integers(3, 7))
    size = int(rng.integers(1, 7))
    if kind < 2:
        return {_word(rng): _thing(depth + 1, rng) for _ in range(size)}
    if kind == 2:
        return [_thing(depth + 1, rng) for _ in range(size)]
    words = " ".join(_word(rng) for _ in range(size))
    return (words, int(rng.integers(0, 10**size)), round(float(rng.normal(0, 10**size)), 3), size > 3)[kind - 3]


def _structured(size: int, rng: Rng) -> bytes:
    indent = (None, 2, 4)[int(rng.integers(3))]
    if rng.random() < 0.3:
        return _repeated(size, lambda: json.dumps({"id": int(rng.integers(9999)), "v": _thing(2, rng)})).encode()
    things: list[object] = []
    length = 0
    while length < size:
        things.append({_word(rng): _thing(1, rng) for _ in range(3)})
        length += len(json.dumps(things[-1]))
    if rng.random() < 0.2:
        return pickle.dumps(things, protocol=4)
    return json.dumps(things if rng.random() < 0.5 else {_word(rng): t for t in things}, indent=indent).encode()


def _element(depth: int, rng: Rng) -> str:
    name = _word(rng).lower()
    attributes = "".join(f' {_word(rng).lower()}="{_word(rng)}"' for _ in range(int(rng.integers(0, 3))))
    inside = " ".join(_word(rng) for _ in range(int(rng.integers(1, 9))))
    if depth < 4 and rng.random() < 0.6:
        inside = (
            "\n" + "\n".join("  " * depth + _element(depth + 1, rng) for _ in range(int(rng.integers(1, 4)))) + "\n"
        )
    return f"<{name}{attributes}>{inside}</{name}>"


def _markup(size: int, rng: Rng) -> bytes:
    body = _repeated(size, lambda: _element(1, rng))
    if rng.random() < 0.5:
        return f'<?xml version="1.0" encoding="UTF-8"?>\n<{_word(rng)}>\n{body}\n</{_word(rng)}>\n'.encode()
    head = f"<!DOCTYPE html>\n<html>\n<head><title>{_word(rng)}</title></head>"
    return f"{head}\n<body>\n{body}\n</body>\n</html>\n".encode()


def _encoded(size: int, rng: Rng) -> bytes:
    data = rng.bytes(max(size * 3 // 4, 12))
    if rng.random() < 0.5:
        lines = re.sub(r"(.{64})", r"\1\n", base64.b64encode(data).decode())
        return f"-----BEGIN {_word(rng).upper()}-----\n{lines}\n-----END {_word(rng).upper()}-----\n".encode()
    return re.sub(r"(.{32})", r"\1\n", data[: size // 2].hex()).encode()


# -- binary --------------------------------------------------------------------------------------------------------


def _content(size: int, rng: Rng) -> bytes:
    return (_prose, _source, _table, _program)[int(rng.integers(4))](size, rng)


def _packed(size: int, rng: Rng) -> bytes:
    data = _content(4 * size, rng)
    kind = int(rng.integers(5))
    if kind == 0:
        return gzip.compress(data, mtime=0)
    if kind == 1:
        return bz2.compress(data)
    if kind == 2:
        return lzma.compress(data)
    return zlib.compress(data) if kind == 3 else rng.bytes(size)


def _archive(size: int, rng: Rng) -> bytes:
    file = io.BytesIO()
    members = int(rng.integers(1, 6))
    contents = {f"{_word(rng)}/{_word(rng)}.{_word(rng)[:3].lower()}": _content(size, rng) for _ in range(members)}
    if rng.random() < 0.6:
        how = zipfile.ZIP_DEFLATED if rng.random() < 0.8 else zipfile.ZIP_STORED
        with zipfile.ZipFile(file, "w", how) as archive:
            for name, data in contents.items():
                archive.writestr(zipfile.ZipInfo(name), data, how)
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in contents.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return file.getvalue()


def _picture(size: int, rng: Rng) -> bytes:
    side = int(np.clip(np.sqrt(size), 8, 96))
    leaves = (dead_leaves(1, 3, side, side, rng)[0] * 255).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(leaves).save(file, PICTURES[int(rng.integers(len(PICTURES)))])
    return file.getvalue()


def _numbers(size: int, rng: Rng) -> bytes:
    kind = ("f4", "f8", "i2", "i4", "i8", "u1")[int(rng.integers(6))]
    array = (rng.lognormal(3, 1.5, size // 4 + 2) * rng.choice([-1, 1], size // 4 + 2)).clip(-30000, 30000)
    array = np.abs(array).clip(0, 255).astype(kind) if kind == "u1" else array.astype(kind)
    file = io.BytesIO()
    if rng.random() < 0.3:
        np.save(file, array)
        return file.getvalue()
    if rng.random() < 0.4:
        with wave.open(file, "wb") as sound:
            sound.setparams((1, 2, 16000, 0, "NONE", ""))
            sound.writeframes(np.cumsum(rng.normal(0, 300, size // 2 + 8)).clip(-30000, 30000).astype("<i2").tobytes())
        return file.getvalue()
    return rng.bytes(4) + struct.pack("<IIQ", 1, int(rng.integers(100)), len(array)) + array.tobytes()


def _code(size: int, rng: Rng) -> bytes:
    """Return instructions one after another."""
    picked = b"".join(_INSTRUCTIONS[i] for i in rng.integers(0, len(_INSTRUCTIONS), size // 3 + 1))
    code = np.frombuffer(picked, np.uint8).copy()
    unknown = code == ord("?")
    code[unknown] = rng.integers(0, 256, int(unknown.sum()))
    return code.tobytes()


def _program(size: int, rng: Rng) -> bytes:
    """Return a header, instructions, zeros and names, as executables and libraries have them."""
    names = b"\0".join(_word(rng).encode() for _ in range(size // 32 + 2)) + b"\0"
    if rng.random() < 0.6:
        head = (
            b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQ", int(rng.integers(1, 4)), 62, 1, 0x1040, 64, size)
        )
        head += struct.pack("<IHHHHHH", 0, 64, 56, int(rng.integers(2, 14)), 64, 30, 29)
        table = b"".join(
            struct.pack("<IIQQQQQQ", i % 7, 4 + i % 3, a, a, a, 0x1C8, 0x1C8, 8)
            for i, a in enumerate(map(int, np.sort(rng.integers(0, 1 << 16, 8))))
        )
        head += table
    else:
        head = b"MZ\x90\0\x03\0\0\0\x04\0\0\0\xff\xff\0\0\xb8" + bytes(43) + b"\x80\0\0\0" + bytes(64)
        head += b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 5, int(rng.integers(1 << 31)), 0, 0, 240, 0x22)
    parts = [_code(size // 2, rng), bytes(int(rng.integers(16, 200))), names]
    order = rng.permutation(3)
    symbols = rng.integers(0, 1 << 16, (size // 96 + 1, 3)).astype("<u8").tobytes()
    return head + b"".join(parts[i] for i in order) + symbols + b".text\0.data\0.bss\0.shstrtab\0"


def _document(size: int, rng: Rng) -> bytes:
    """Return a PDF: text between compressed streams."""
    parts = ["%PDF-1.5\n%âãÏÓ\n".encode("latin-1")]
    for number in range(1, 2 + size // 1500):
        stream = zlib.compress(_prose(2000, rng))
        head = f"{number} 0 obj\n<< /Type /{_word(rng).title()} /Length {len(stream)} /Filter /FlateDecode >>\nstream\n"
        parts += [head.encode(), stream, b"\nendstream\nendobj\n"]
    rows = "".join(f"{int(rng.integers(10**6)):010d} 00000 n \n" for _ in range(1 + size // 400))
    parts.append(f"xref\n0 9\n{rows}trailer\n<< /Size 9 /Root 1 0 R >>\nstartxref\n{size}\n%%EOF\n".encode())
    return b"".join(parts)


_MAKERS: dict[Callable[[int, Rng], bytes], float] = {
    _prose: 3,
    _source: 5,
    _table: 1,
    _structured: 1.5,
    _markup: 1.5,
    _encoded: 0.5,
    _packed: 1,
    _archive: 1,
    _picture: 1.5,
    _numbers: 1.5,
    _program: 1.5,
    _document: 0.5,
}
_SHARES = np.array(list(_MAKERS.values())) / sum(_MAKERS.values())


def fill_bytes(recipe: Recipe, feeds: dict[str, np.ndarray], rng: Rng) -> None:
    """Replace the inputs of a batch that hold bytes by files: two axes, and as many values as bytes have."""
    for name in byte_inputs(recipe):
        count, length = feeds[name].shape
        made = byte_files(count, length, recipe.ranges[name], rng)
        feeds[name] = np.ascontiguousarray(made, dtype=feeds[name].dtype)


def byte_inputs(recipe: Recipe) -> list[str]:
    """Return the names of the inputs that hold bytes."""
    shapes = {spec.name: recipe.shape(spec) for spec in recipe.specs if recipe.ranges.get(spec.name) in VALUES}
    return [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] >= SHORTEST_FILE]
