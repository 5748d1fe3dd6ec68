"""LSTM and GRU classifiers."""
# ruff: noqa: D102 -- each `forward` is what its class says

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.builders.export import Network


class Classifier(nn.Module):
    """Embedding, recurrent layers, and a linear layer on the last step or on the final states."""

    def __init__(self, cell: type[nn.RNNBase], layers: int, both: bool, final: bool) -> None:
        super().__init__()
        self.final, self.states = final, 2 if both else 1
        self.embedding = nn.Embedding(31, 9)
        self.rnn = cell(9, 14, layers, batch_first=True, bidirectional=both)
        self.norm = nn.LayerNorm(14 * self.states)
        self.fc = nn.Linear(14 * self.states, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        steps, state = self.rnn(self.embedding(tokens))
        if self.final:
            hidden = state[0] if isinstance(state, tuple) else state
            return self.fc(self.norm(torch.cat([hidden[-1 - i] for i in range(self.states)], 1)))
        return self.fc(self.norm(steps[:, -1]))


def _network(module: nn.Module) -> Network:
    return Network(module, {"tokens": torch.randint(31, (2, 6))}, ["logits"])


def lstm() -> Network:
    return _network(Classifier(nn.LSTM, 2, both=False, final=False))


def gru() -> Network:
    return _network(Classifier(nn.GRU, 2, both=False, final=True))


def bilstm() -> Network:
    return _network(Classifier(nn.LSTM, 2, both=True, final=True))
