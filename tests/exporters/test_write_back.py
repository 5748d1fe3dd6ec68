"""Pruned weights in the user's own PyTorch classes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import ModelProto
from torch import Tensor, nn

import spa
from models.builders.export import Network, dynamo, randomise, torchscript
from spa.coupling.plan import make_plan
from spa.errors import UnsupportedError
from spa.exporters.pytorch import graph_module, to_torch, write_back
from spa.exporters.pytorch.sizes import restate
from spa.frameworks.torch import copied
from spa.running import sessions
from spa.running.runtime import load_session, run


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.conv1 = nn.Conv2d(24, 40, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(40)
        self.act = nn.PReLU(40)
        self.conv2 = nn.Conv2d(40, 24, 3, padding=1)
        self.fc = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.depth = nn.Conv2d(24, 48, 3, padding=1, groups=24)
        self.groups = nn.Conv2d(48, 40, 3, padding=1, groups=8)
        self.norm = nn.GroupNorm(4, 40)
        self.up = nn.ConvTranspose2d(40, 20, 2, 2, groups=4)
        self.head = nn.Conv2d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depth(F.relu(self.stem(x))))
        x = F.silu(self.norm(self.groups(x)))
        return self.head(F.relu(self.up(x)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(11, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 32, bias=False), nn.Tanh()
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 16)
        self.first = nn.LSTM(16, 24, batch_first=True, bidirectional=True)
        self.second = nn.LSTM(48, 24, batch_first=True)
        self.fc = nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.first(self.embedding(tokens))
        x, _ = self.second(x)
        return self.fc(x[:, -1])


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(9, 24, 2, batch_first=True)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    """Counts its heads, and their size, in attributes."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.scale = self.head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.fc = nn.Linear(32 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.relu(self.conv(x)), 2)
        x = x.view(-1, 128)
        return self.fc(x)


IMAGE, STEPS = torch.randn(3, 3, 8, 8), torch.randn(3, 5, 9)
MODULES = {
    "deep": (Deep, STEPS),
    "residual": (Residual, IMAGE),
    "depthwise": (Depthwise, IMAGE),
    "mlp": (Mlp, torch.randn(3, 11)),
    "lstm": (Recurrent, torch.randint(31, (3, 6))),
    "block": (Block, torch.randn(3, 5, 32)),
}


def imported(
    build: type[nn.Module], example: Tensor, script: bool = False
) -> tuple[nn.Module, ModelProto, dict[str, str]]:
    """A module with random weights, its ONNX model, and the state_dict keys of its initializers."""
    torch.manual_seed(0)
    module = build()
    network = Network(module, {"x": example}, ["y"], dynamo={"optimize": False})
    randomise(network)
    model = torchscript(network) if script else dynamo(network)
    state = module.state_dict()
    return module, model, {t.name: t.name for t in model.graph.initializer if t.name in state}


def apart(module: nn.Module, model: ModelProto, example: Tensor) -> float:
    wanted = run(load_session(model), {model.graph.input[0].name: example.numpy()})[0]
    with torch.no_grad():
        got = module(example).numpy()
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def pruned(name: str, **options: object) -> tuple[nn.Module, spa.Result, dict[str, str], Tensor]:
    module, model, names = imported(*MODULES[name])
    options = {"ratio": 0.5, "of": "params", "criterion": "l2", "round_to": 1, **options}
    return module, spa.prune(model, **options), names, MODULES[name][1]


@pytest.mark.parametrize("script", [False, True], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", MODULES)
def test_the_users_class_takes_the_pruned_weights_and_gives_the_pruned_graphs_outputs(name: str, script: bool) -> None:
    example = MODULES[name][1]
    module, model, names = imported(*MODULES[name], script)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    result = spa.prune(model, ratio=0.5, of="params", criterion="l2", round_to=1)
    small = write_back(module, result, names, example)
    assert type(small) is type(module)
    assert size(small) < 0.8 * size(module)
    assert apart(small, result.model, example) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_large_networks_are_compared_by_way_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    module, result, names, example = pruned("residual")
    monkeypatch.setattr(sessions, "LARGE", 10)
    assert apart(write_back(module, result, names, example), result.model, example) < 1e-5


@pytest.mark.parametrize("name", ["residual", "block"])
def test_what_was_written_back_trains_and_can_be_exported_again(name: str) -> None:
    module, result, names, example = pruned(name)
    small = write_back(module.train(), result, names, example)
    assert small.training
    optimiser = torch.optim.SGD(small.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        loss = small(example).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    again = torchscript(Network(small, {"x": example}, ["y"]))
    assert apart(small.eval(), again, example) < 1e-5


def test_sizes_that_modules_keep_follow_the_weights() -> None:
    small = write_back(*pruned("depthwise"))
    assert small.stem.out_channels == small.depth.in_channels == small.depth.groups == small.stem.weight.shape[0] < 24
    assert small.depth.out_channels == small.groups.in_channels == small.groups.groups * small.groups.weight.shape[1]
    assert small.norm.num_channels == small.groups.out_channels == small.up.in_channels
    assert small.up.out_channels == small.head.in_channels == small.up.weight.shape[1] * small.up.groups
    recurrent = write_back(*pruned("lstm"))
    assert recurrent.embedding.embedding_dim == recurrent.first.input_size == recurrent.first.weight_ih_l0.shape[1]
    assert recurrent.second.input_size == 2 * recurrent.first.hidden_size
    mlp = write_back(*pruned("mlp", cross_norm=True))
    assert mlp.net[1].normalized_shape == (mlp.net[0].out_features,) == (mlp.net[3].in_features,)


@pytest.mark.parametrize("script", [False, True], ids=["dynamo", "torchscript"])
def test_heads_under_their_usual_names_are_counted_anew(script: bool) -> None:
    module, model, names = imported(*MODULES["block"], script)
    analysis = spa.analyze(model)
    heads = next(g for g in analysis.prunable if g.size == 4)
    sizes = next(g for g in analysis.prunable if g.size == 8)
    plan = make_plan(analysis, {heads.name: np.array([0, 2, 3]), sizes.name: np.array([1, 2, 4, 5, 7])})
    result = spa.prune(model, plan=plan)
    small = write_back(module, result, names, MODULES["block"][1])
    assert (small.attention.num_heads, small.attention.head_dim) == (3, 5)
    assert (small.attention.qkv.out_features, small.attention.proj.in_features) == (3 * 3 * 5, 3 * 5)
    assert apart(small, result.model, MODULES["block"][1]) < 1e-5


class Fused(Attention):
    """Leaves the scale to PyTorch while it trains, and takes its own otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.training:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


def test_the_scale_follows_the_size_of_a_head_and_queries_make_up_for_it() -> None:
    class Network(Block):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Fused(32, 4)

    example = torch.randn(3, 5, 32)
    module, model, names = imported(Network, example)
    sizes = next(g for g in spa.analyze(model).prunable if g.size == 8)
    plan = make_plan(spa.analyze(model), {sizes.name: np.array([1, 2, 4, 5, 7])})
    small = write_back(module, spa.prune(model, plan=plan), names, example)
    assert small.attention.head_dim == 5
    assert small.attention.scale == pytest.approx(5**-0.5)
    with torch.no_grad():
        assert torch.allclose(small.train()(example), small.eval()(example), atol=1e-5)


def test_sizes_of_parts_follow_the_layer_that_makes_them() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.parts = nn.Linear(11, 64), nn.Linear(32, 5), (32, 20, 12)

        def forward(self, x: Tensor) -> Tensor:
            gate, first, second = torch.split(self.fc1(x), self.parts, -1)
            return self.fc2(gate.sigmoid() * torch.cat([first.tanh(), second], -1))

    example = torch.randn(3, 11)
    module, model, names = imported(Gated, example)
    result = spa.prune(model, ratio=0.4, of="params", criterion="l2", round_to=1)
    small = write_back(module, result, names, example)
    assert sum(small.parts) == small.fc1.out_features < 64
    assert small.parts[0] == small.fc2.in_features == small.parts[1] + small.parts[2]
    assert apart(small, result.model, example) < 1e-5


def test_the_width_of_equal_parts_follows_the_layer_that_makes_them() -> None:
    class Cascade(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.fc1, self.fc2 = 12, nn.Linear(11, 36), nn.Linear(36, 11)
            self.inner = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            first, second, third = torch.split(self.fc1(x).relu(), self.width, -1)
            second = self.inner[0](first + second).relu()
            third = self.inner[1](second + third).relu()
            return self.fc2(torch.cat([first, second, third], -1))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cascade, self.head = Cascade(), nn.Linear(11, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cascade(x))

    example = torch.randn(3, 11)
    module, model, names = imported(Network, example)
    result = spa.prune(model, ratio=0.4, of="params", criterion="l2", round_to=1)
    small, how, _ = to_torch(result, module, names, example)
    assert how == "module"
    assert small.cascade.fc1.out_features == 3 * small.cascade.width < 36
    assert apart(small, result.model, example) < 1e-5


class Unbiased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3, bias=False), nn.Conv2d(32, 24, 3, bias=False)
        self.fc = nn.Linear(24, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


@pytest.mark.parametrize("build", [Unbiased, Residual])
def test_layers_that_reconstruction_gives_a_bias_get_one(build: type[nn.Module]) -> None:
    module, model, names = imported(build, IMAGE)
    result = spa.prune(model, ratio=0.5, criterion="obspa", round_to=1, samples=64)
    small = write_back(module, result, names, IMAGE)
    assert (build is Unbiased) == (size(small) - sum(p.numel() for k, p in small.named_parameters() if k in names) > 0)
    assert apart(small, result.model, IMAGE) < 1e-5


def test_parameters_that_are_one_stay_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(31, 40)
            self.fc = nn.Linear(40, 40)
            self.head = nn.Linear(40, 31)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.fc(self.embedding(tokens)).tanh())

    example = torch.randint(31, (3, 6))
    module, model, names = imported(Tied, example)
    result = spa.prune(model, ratio=0.4, of="params", criterion="l2", round_to=1)
    small = write_back(module, result, names, example)
    assert small.head.weight is small.embedding.weight
    assert small.head.in_features == small.embedding.embedding_dim < 40
    assert apart(small, result.model, example) < 1e-5


# -- findings ----------------------------------------------------------------------------------------------------


def test_a_size_in_the_forward_code_is_found_and_the_graph_takes_its_place() -> None:
    example = IMAGE
    module, model, names = imported(HardCoded, example)
    result = spa.prune(model, ratio=0.5, of="params", criterion="l2", round_to=1)
    found = r"HardCoded\.forward, line \d+ of test_write_back\.py: 'x = x\.view\(-1, 128\)' works only with the sizes"
    with pytest.raises(UnsupportedError, match=found):
        write_back(module, result, names, example)
    other, how, notes = to_torch(result, module, names, example)
    assert how == "graph"
    assert re.search(found, notes[0])
    assert set(dict(other.named_parameters())) == set(dict(module.named_parameters()))
    assert apart(other, result.model, example) < 1e-5


def test_layers_of_one_lstm_must_stay_equally_wide() -> None:
    module = nn.Sequential(nn.LSTM(9, 24, 2))
    module[0].weight_hh_l1 = nn.Parameter(torch.zeros(4 * 15, 15))
    widths = r"LSTM '0' has layers of different widths after pruning \(weight_hh_l0: 24, weight_hh_l1: 15\)"
    with pytest.raises(UnsupportedError, match=widths):
        restate(module, {})


def test_names_that_lead_elsewhere_are_refused() -> None:
    module, result, names, example = pruned("mlp")
    with pytest.raises(UnsupportedError, match=r"'head\.weight' is called 'nowhere', which the module lacks"):
        write_back(module, result, {**names, "head.weight": "nowhere"}, example)
    with torch.no_grad():
        module.head.weight += 1
    with pytest.raises(UnsupportedError, match=r"'head\.weight' holds other values .*optimize=False"):
        write_back(module, result, names, example)


def test_a_forward_that_computes_something_else_is_found_by_its_outputs() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.relu(self.fc1(x))) / self.fc1.weight.shape[0]

    example = torch.randn(3, 8)
    module, model, names = imported(Scaled, example)
    result = spa.prune(model, ratio=0.5, of="params", criterion="l2", round_to=1)
    with pytest.raises(UnsupportedError, match=r"Scaled with the pruned weights and the pruned ONNX model differ: by "):
        write_back(module, result, names, example)


def test_to_torch_prefers_the_users_class() -> None:
    module, result, names, example = pruned("residual")
    small, how, notes = to_torch(result, module.eval(), names, example)
    assert (type(small), how, notes) == (Residual, "module", ())
    graph, how, notes = to_torch(result)
    assert (how, notes, graph.training) == ("graph", (), False)
    assert isinstance(graph, type(graph_module(result.model)))


def test_a_class_that_computes_a_branch_that_went_becomes_the_graph() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(7, 16), nn.Linear(16, 3)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in "ab")

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    torch.manual_seed(0)
    example = torch.randn(5, 7)
    result = spa.prune(Two().eval(), example_inputs=example, criterion="l2", depth="blocks.1")
    assert [branch.gone for branch in result.report.branches] == [True]
    with pytest.warns(UserWarning, match="Two's own code computes the residual branch '.*', which is gone"):
        module = result.pruned
    assert not any(key.startswith("blocks.1.") for key in module.state_dict())
    expected = run(load_session(result.model), {result.model.graph.input[0].name: example.numpy()})[0]
    assert np.allclose(module(example).detach().numpy(), expected, atol=1e-6)


class Cached(nn.Module):
    """Keeps what it has computed of its parameters in evaluation mode, as LeViT does, until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 16), nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(2, 3))
        self.cache: dict[str, list[Tensor]] = {}

    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and "bias" not in self.cache:
            self.cache["bias"] = [self.table.sum(0)]
        bias = self.table.sum(0) if self.training else self.cache["bias"][0]
        return self.second(F.relu(self.first(x))) + bias


def test_tensors_that_a_module_keeps_of_earlier_runs_are_computed_anew() -> None:
    module, x = Cached().eval(), torch.randn(4, 5)
    module.second.train()
    module(x)  # outside of no_grad, so that what is kept has a history
    result = spa.prune(module, example_inputs=(x,), criterion="l2", ratio=0.4)
    small = result.pruned
    assert type(small) is Cached
    assert small.first.out_features < 16
    assert (small.training, small.second.training) == (False, True)
    (expected,) = run(load_session(result.model), {result.model.graph.input[0].name: x.numpy()})
    np.testing.assert_allclose(small(x).detach().numpy(), expected, atol=1e-5)
    assert module.cache
    assert not copied(module).cache
