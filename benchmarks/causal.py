"""Does a causal language model calibrate better on text that it writes itself?

    python benchmarks/causal.py --texts DIR [--seconds 240] [--seeds 2] [--results DIR]

DIR holds documents (.md, .rst, .txt, .py, METADATA at any depth). A small decoder is trained on seven eighths of them;
pruned without data from each kind of made-up sequence, and given windows of its own training text, it is compared with
the dense one on the last eighth: the divergence of the next token (KL, in nats). Decision 34 rests on it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx
import torch
from torch import nn

import spa
from spa.calibration import sampling
from spa.running.runtime import load_session, run

ENDINGS = {".md", ".rst", ".txt", ".py"}
WINDOW, VOCABULARY, WIDTH, HEADS, LAYERS = 64, 2048, 128, 4, 4
HELD_OUT, SAMPLES, RATIOS = 320, 128, (0.3, 0.5)
KINDS = ("ids by Zipf's law", "pages of SPA", "sampled, from Zipf's law", "sampled, from pages", "given: training text")


# -- the network -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and MLP, each with a normalisation before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the stream after the block, (samples, WINDOW, WIDTH)."""
        h = self.norms[0](x)
        q, k, v = (f(h).view(-1, WINDOW, HEADS, WIDTH // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5 + mask, -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(-1, WINDOW, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Decoder(nn.Module):
    """A decoder of windows of one length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(WINDOW, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("mask", torch.triu(torch.full((WINDOW, WINDOW), -1e9), 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next token, (samples, WINDOW, VOCABULARY)."""
        h = self.embedding(ids) + self.places
        for block in self.blocks:
            h = block(h, self.mask)
        return self.head(self.norm(h))


def trained(ids: np.ndarray, seconds: float) -> Decoder:
    """Train a decoder for some seconds."""
    torch.manual_seed(0)
    network, data = Decoder(), torch.tensor(ids, dtype=torch.int64)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / seconds) < 1:
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, step / 100) * (1 - done) + 1e-5
        at = torch.randint(0, len(data) - WINDOW - 1, (24,)).tolist()
        windows = torch.stack([data[i : i + WINDOW + 1] for i in at])
        loss = nn.functional.cross_entropy(network(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
    return network.eval()


def texts(folder: Path) -> list[str]:
    """Return the documents of a folder in an order drawn once."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and (p.suffix in ENDINGS or p.name == "METADATA"))
    random.Random(0).shuffle(files)
    found = [p.read_text(errors="ignore")[:40_000] for p in files[:3000]]
    return [t for t in found if len(t) > 500]


def prepare(documents: list[str], folder: Path, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Write tokenizer and network into a folder; return the ids of the training and of the other documents."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    others = len(documents) // 8
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents[others:], trainer)
    tokenizer.save(str(folder / "tokens.json"))  # not by the name that is found beside a model
    train, test = (
        np.concatenate([e.ids for e in tokenizer.encode_batch(part)])
        for part in (documents[others:], documents[:others])
    )
    network = trained(train, seconds)
    torch.onnx.export(
        network,
        (torch.zeros(2, WINDOW, dtype=torch.int64),),
        str(folder / "decoder.onnx"),
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_axes={"input_ids": {0: "batch"}, "logits": {0: "batch"}},
        dynamo=False,
    )
    return train, test


# -- measuring ------------------------------------------------------------------------------------------------------


def logs(model: Any, ids: np.ndarray) -> np.ndarray:
    """Return log probabilities of the next token, (samples, WINDOW, VOCABULARY)."""
    session = load_session(model, threads=common.THREADS)
    scores = np.concatenate([run(session, {"input_ids": ids[i : i + 32]})[0] for i in range(0, len(ids), 32)])
    scores -= scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@contextmanager
def sampled(wanted: bool) -> Iterator[None]:
    """Leave sampling on or turn it off."""
    most = sampling.MOST_MACS
    sampling.MOST_MACS = most if wanted else 0.0
    try:
        yield
    finally:
        sampling.MOST_MACS = most


def divergences(folder: Path, train: np.ndarray, test: np.ndarray, seed: int) -> list[list[float]]:
    """Return KL by kind of sequences and ratio."""
    model = onnx.load(folder / "decoder.onnx")
    windows = test[: len(test) // WINDOW * WINDOW].reshape(-1, WINDOW)
    windows = windows[:: max(1, len(windows) // HELD_OUT)][:HELD_OUT].astype(np.int64)
    dense = logs(model, windows)
    at = np.random.default_rng(seed).integers(0, len(train) - WINDOW, SAMPLES + 32)
    given = {"input_ids": np.stack([train[i : i + WINDOW] for i in at]).astype(np.int64)}
    table = []
    for kind in KINDS:
        more: dict[str, Any] = {"data": given} if kind.startswith("given") else {}
        more |= {"tokenizer": str(folder / "tokens.json")} if "pages" in kind else {}
        found = []
        for ratio in RATIOS:
            with sampled(kind.startswith("sampled")):
                result = spa.prune(model, ratio=ratio, samples=SAMPLES, seed=seed, threads=common.THREADS, **more)
            found.append(float((np.exp(dense) * (dense - logs(result.model, windows))).sum(-1).mean()))
        print(seed, kind, found, flush=True)
        table.append(found)
    return table


def page(data: dict[str, Any]) -> str:
    """Return results/causal.md."""
    header = ["calibration sequences", *(f"{ratio:.0%} of MACs" for ratio in RATIOS)]
    by_seed = data["seeds"].values()
    rows = [
        [kind, *(", ".join(f"{table[i][j]:.4f}" for table in by_seed) for j in range(len(RATIOS)))]
        for i, kind in enumerate(KINDS)
    ]
    return f"""# Calibration of causal language models

A decoder of {LAYERS} layers of width {WIDTH}, {VOCABULARY} ids and windows of {WINDOW}, trained for
{data["trained"]:.0f} s on seven eighths of {data["documents"]} documents; {SAMPLES} calibration sequences. KL to the
dense network (nats) on {HELD_OUT} windows of the others, by seed (made by `benchmarks/causal.py`). SPA samples by
default.

{common.table(header, rows)}

{common.describe(data["machine"])}
"""


def main() -> None:
    """Train, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240, help="of training")
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(common.THREADS)
    documents = texts(options.texts)
    data: dict[str, Any] = {"machine": common.machine(), "trained": options.seconds, "documents": len(documents)}
    data["seeds"] = {}
    with tempfile.TemporaryDirectory() as folder:
        train, test = prepare(documents, Path(folder), options.seconds)
        for seed in range(options.seeds):
            data["seeds"][str(seed)] = divergences(Path(folder), train, test, seed)
            common.write("causal", page(data), data, options.results)


if __name__ == "__main__":
    main()
