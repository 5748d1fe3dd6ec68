from __future__ import annotations

import importlib
import io
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import nn
from torch.nn import functional as F

import spa
from spa.errors import ModelError, PlanError, UnsupportedError
from spa.importers import Imported
from spa.importers.pytorch import convert
from spa.model.versions import newest_opset
from spa.running import sessions
from spa.running.feeds import working_feeds
from spa.running.runtime import load_session, run

torch.set_num_threads(1)


# -- networks ----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two BatchNorms of equal values, as a fresh network has them, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(12), nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(x + self.bn2(self.inner(x)))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 10, 1),
            nn.BatchNorm2d(10),
            nn.ReLU6(),
            nn.Conv2d(10, 10, 3, groups=10),
            nn.Hardswish(),
            nn.Conv2d(10, 7, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Tied(nn.Module):
    """Tied embeddings, keyword arguments, one of which is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, scale: int = 3, other: Any = None, *, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * mask[..., None] * scale
        return self.head(x + self.down(F.gelu(self.up(x))))


@dataclass
class Answer:
    last: torch.Tensor


class Branches(nn.Module):
    """Containers in and out, a parameter that is called as an input is, an input that is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 16), nn.Linear(5, 16)
        self.out = nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], scale: torch.Tensor) -> dict[str, Any]:
        x = (F.relu(self.left(pair[0])) + F.relu(self.right(pair[1]))) * self.scale * scale
        return {"logits": self.out(x), "pair": pair[0], "more": [None, Answer(x.sum(1)), x.shape[0]], "ready": True}


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    dynamic_shapes: Any = None


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


NETWORKS = {
    "residual": Case(Residual, lambda: torch.randn(2, 3, 9, 9)),
    "depthwise": Case(Depthwise, lambda: torch.randn(1, 3, 7, 7)),
    "mlp": Case(mlp, lambda: np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)),
    "recurrent": Case(Recurrent, lambda: torch.randn(2, 7, 5)),
    "encoder": Case(encoder, lambda: (torch.randn(2, 5, 12),), {"src": {0: "batch", 1: "time"}}),
    "tied": Case(Tied, lambda: {"ids": torch.randint(0, 13, (2, 5)), "mask": torch.ones(2, 5)}),
    "branches": Case(Branches, lambda: ((torch.randn(2, 4), torch.randn(2, 5)), torch.ones(1))),
}


@cache
def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name].build()


@cache
def imported(name: str, exporter: str | None = None) -> Imported:
    case = NETWORKS[name]
    return convert(built(name), case.example(), dynamic_shapes=case.dynamic_shapes, exporter=exporter)


def shapes(values: Any) -> dict[str, list[str | int]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def answers(model: ModelProto, batch: int) -> list[np.ndarray]:
    session = load_session(model)
    return run(session, working_feeds(session, batch=batch))


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return torch.jit.script(module)


def exported(module: nn.Module, *args: Any, **options: Any) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module.eval(), *args, **options)


# -- what every network gives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_convert_and_prune(name: str) -> None:
    result = imported(name)
    assert (result.kind, result.exporter, result.notes) == ("torch", "torch.onnx.export(dynamo=True)", ())
    assert result.error < 1e-5
    pruned = spa.prune(result.model, criterion="l2", ratio=0.2, round_to=1)
    assert pruned.report.reached > 0.1
    for batch in (1, 3):
        before, after = answers(result.model, batch), answers(pruned.model, batch)
        assert [a.shape for a in before] == [a.shape for a in after]
        assert all(np.isfinite(a).all() for a in after)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"encoder"}))
def test_names_lead_back_to_the_state_dict_and_values_are_its_own(name: str, exporter: str) -> None:
    result, state = imported(name, exporter), built(name).state_dict()
    initializers = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    keys = {key for key in state if not key.endswith("num_batches_tracked")}
    assert set(result.names.values()) | result.aliases.keys() == keys
    assert set(result.aliases.values()) <= result.names.keys()
    for initializer, key in result.names.items():
        assert initializer == key
        np.testing.assert_array_equal(initializers[initializer], state[key].numpy())


def test_batch_normalisation_is_kept() -> None:
    for exporter in ("dynamo", "torchscript"):
        operators = Counter(n.op_type for n in imported("residual", exporter).model.graph.node)
        assert operators["BatchNormalization"] == 2
        assert operators["Identity"] == 0


def test_convolutions_without_bias_get_none() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.ConvTranspose2d(5, 7, 3, bias=False), nn.Conv2d(7, 2, 1))
    model = convert(net.eval(), torch.randn(2, 3, 8, 8)).model
    assert [(n.op_type, len(n.input)) for n in model.graph.node] == [("Conv", 2), ("ConvTranspose", 2), ("Conv", 3)]


def test_tied_parameters_are_listed_under_both_keys() -> None:
    for exporter in ("dynamo", "torchscript"):
        result = imported("tied", exporter)
        assert result.aliases == {"head.weight": "embed.weight"}
        assert "head.weight" not in result.names


def test_inputs_and_outputs_have_the_names_of_arguments_and_keys() -> None:
    graph = imported("branches").model.graph
    assert shapes(graph.input) == {"pair.0": ["batch", 4], "pair.1": ["batch", 5], "scale_2": [1]}
    assert shapes(graph.output) == {"logits": ["batch", 3], "pair": ["batch", 4], "more.1.last": ["batch"]}
    graph = imported("tied").model.graph
    assert shapes(graph.input) == {"ids": ["batch", 5], "mask": ["batch", 5]}
    assert shapes(graph.output) == {"output": ["batch", 5, 13]}


def test_axes_open_as_asked() -> None:
    assert shapes(imported("encoder").model.graph.output) == {"output": ["batch", "time", 12]}
    assert shapes(imported("depthwise").model.graph.input) == {"input": ["batch", 3, 7, 7]}  # from a batch of one
    assert shapes(imported("residual", "torchscript").model.graph.output) == {"output": ["batch", 5]}
    closed = convert(mlp(), torch.randn(3, 6), dynamic_batch=False)
    assert shapes(closed.model.graph.input) == {"input": [3, 6]}
    assert closed.notes == ()


def test_no_trace_of_the_users_files_is_left() -> None:
    assert str(Path(__file__).parent).encode() not in imported("residual").model.SerializeToString()


def test_opsets_are_as_asked() -> None:
    versions = {o.domain: o.version for o in convert(mlp(), torch.randn(3, 6), opset=21).model.opset_import}
    assert versions[""] == 21


def test_half_precision_converts_within_its_own_rounding() -> None:
    assert 0 < convert(mlp().half(), torch.randn(3, 6).half()).error < 8e-3


def test_large_networks_are_checked_by_way_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "LARGE", 10)
    assert convert(mlp(), torch.randn(3, 6), exporter="torchscript").error < 1e-5


def test_weights_that_the_tracing_exporter_puts_beside_the_model_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It does so above 2 GiB, a number compiled into PyTorch, and only where it knows the file's name as a string."""
    wanted = convert(built("residual"), torch.ones(2, 3, 9, 9), exporter="torchscript")
    original, beside = torch.onnx.export, []

    def export(module: nn.Module, args: Any, path: Any, **options: Any) -> None:
        assert isinstance(path, str)
        original(module, args, path, **options)
        outside = {"save_as_external_data": True, "all_tensors_to_one_file": False, "size_threshold": 0}
        onnx.save(onnx.load(path), path, **outside)
        beside.extend(file.name for file in Path(path).parent.iterdir() if file != Path(path))

    monkeypatch.setattr(torch.onnx, "export", export)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = convert(built("residual"), torch.ones(2, 3, 9, 9), exporter="torchscript")
    assert "module.head.weight" in beside
    assert list(tmp_path.iterdir()) == []
    assert (found.names, found.error) == (wanted.names, wanted.error)
    assert not any(t.external_data for t in found.model.graph.initializer)
    for batch in (1, 3):
        for got, expected in zip(answers(found.model, batch), answers(wanted.model, batch), strict=True):
            np.testing.assert_array_equal(got, expected)


# -- what does not go smoothly -----------------------------------------------------------------------------------


class Squarely(nn.Module):
    """Takes batches of two only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(2, 6))


class Large(Squarely):
    """Does something else with batches of eight and more, which ``torch.export`` cannot express."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.shape[0] < 8 else self.linear(x) + 1


class Deciding(Squarely):
    """Looks at values, which ``torch.export`` cannot express."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > -1e9 else x


class Drawing(Squarely):
    """Draws random numbers."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x), x + torch.rand_like(x)


class Folding(Squarely):
    """Adds up patches within sizes taken from a tensor, which the TorchScript exporter fails at."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.fold(self.linear(x)[:, :, None] * torch.ones(4), (x.shape[1] - 4, 2), (1, 1))


class Windows(Squarely):
    """Takes windows of what was padded, whose size the TorchScript exporter does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(self.linear(x), [2, 2]).unfold(1, 3, 2)


class Exotic(Squarely):
    """Uses what ONNX has no word for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.special.i0e(torch.linalg.eigvals(x[:, :1, None]).real)


def test_a_network_that_takes_one_batch_only_is_exported_with_it() -> None:
    result = convert(Squarely(), torch.randn(2, 6))
    assert shapes(result.model.graph.input) == {"x": [2, 6]}
    assert result.notes == ("the batch is fixed to that of the example inputs: the network itself takes no other",)


def test_a_batch_that_the_exporter_fixes_is_told() -> None:
    result = convert(Large(), torch.randn(2, 6))
    assert shapes(result.model.graph.input) == {"x": [2, 6]}
    assert result.exporter == "torch.onnx.export(dynamo=True)"
    assert result.notes[0].startswith(
        "the batch is fixed to that of the example inputs: UserError: Not all values of batch"
    )


def test_a_network_without_batch_has_nothing_to_note() -> None:
    class Scaling(Squarely):
        def forward(self, scale: torch.Tensor) -> torch.Tensor:
            return self.linear.weight * scale

    result = convert(Scaling(), torch.tensor(3.0))
    assert shapes(result.model.graph.input) == {"scale": []}
    assert result.notes == ()


def test_a_network_that_does_something_else_with_a_batch_of_one_keeps_its_batch() -> None:
    class Squeezing(Squarely):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.squeeze())

    result = convert(Squeezing(), torch.randn(2, 6))
    assert shapes(result.model.graph.input) == {"x": [2, 6]}
    assert result.notes[0].startswith(
        "the batch is fixed to that of the example inputs: output 'output' of inputs [1, 6] is [1, 3]"
    )


def test_limits_of_axes_that_are_opened_on_request_are_told() -> None:
    class Positions(Squarely):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(9, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x + self.positions[: x.shape[1]])

    result = convert(Positions(), torch.randn(2, 4, 6), dynamic_shapes=({0: "batch", 1: "time"},))
    assert result.exporter == "torch.onnx.export(dynamo=True)"
    assert shapes(result.model.graph.input) == {"x": ["batch", "time", 6]}
    assert result.notes == ("the network takes 'time' of at most 9",)


def test_what_dynamo_cannot_capture_is_traced(capfd: pytest.CaptureFixture[str]) -> None:
    result = convert(Deciding(), torch.randn(2, 6))
    assert capfd.readouterr() == ("", "")
    assert result.exporter == "torch.onnx.export(dynamo=False)"
    assert shapes(result.model.graph.input) == {"x": ["batch", 6]}
    (note,) = result.notes
    assert note.startswith("torch.onnx.export(dynamo=True) fails: ")


def test_outputs_that_differ_are_named() -> None:
    with pytest.raises(
        ModelError,
        match=r"Drawing.forward\(x\) in ONNX is not the same: output 'output_1' of inputs \[2, 6\] differs by",
    ):
        convert(Drawing(), torch.randn(2, 6))


def test_what_no_exporter_can_express_is_refused_with_the_reasons() -> None:
    with pytest.raises(UnsupportedError) as caught:
        convert(Exotic(), torch.randn(2, 6))
    message = str(caught.value)
    assert message.startswith("Exotic.forward(x) cannot be expressed in ONNX. torch.onnx.export(dynamo=True): ")
    assert "torch.onnx.export(dynamo=False): " in message
    assert "i0e" in message or "eigvals" in message


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (Folding, "TypeError: 'NoneType' object is not subscriptable (Occurred when translating col2im)"),
        (Windows, "SymbolicValueError: Unsupported: ONNX export of operator Unfold, input size not accessible"),
    ],
)
def test_a_refusal_of_one_exporter_names_the_operator_and_the_other_exporter(network: Any, said: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        convert(network(), torch.randn(2, 6), exporter="torchscript")
    assert str(caught.value) == (
        f"{network.__name__}.forward(x) cannot be expressed in ONNX. torch.onnx.export(dynamo=False): {said}. "
        "Try exporter='dynamo', which the default does, too. Change that operator, or convert a part of the network."
    )
    assert convert(network(), torch.randn(2, 6)).exporter == "torch.onnx.export(dynamo=True)"


def test_exporters_print_nothing_of_theirs(capfd: pytest.CaptureFixture[str]) -> None:
    class Packed(Recurrent):
        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.lstm(packed)[0].data)

    with pytest.raises(UnsupportedError, match="cannot be expressed in ONNX"):
        convert(Packed(), (torch.randn(2, 5, 5), torch.tensor([5, 3])))
    print("still here")
    assert capfd.readouterr() == ("still here\n", "")


def test_what_is_prepared_for_quantisation_aware_training_is_refused_with_a_remedy() -> None:
    from torch.ao.quantization import FakeQuantize

    network = nn.Sequential(nn.Linear(6, 5), FakeQuantize())
    with pytest.raises(UnsupportedError, match=r"quantisation-aware training .* Prune the network before that"):
        convert(network, torch.randn(2, 6))


def test_bfloat16_is_refused_with_a_remedy() -> None:  # by the importer alone; spa.convert does what the remedy says
    with pytest.raises(UnsupportedError, match=r"few operators in bfloat16: convert network.float\(\)"):
        convert(mlp().bfloat16(), torch.randn(2, 6).bfloat16())


def test_the_network_is_not_changed() -> None:
    class Counting(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    network = Counting().train()
    network.bn1.eval()
    network.stem.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    parameters = list(network.parameters())
    torch.manual_seed(5)
    convert(network, torch.randn(2, 3, 9, 9))
    torch.manual_seed(5)
    torch.randn(2, 3, 9, 9)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    convert(network, torch.randn(2, 3, 9, 9), exporter="torchscript")
    assert torch.equal(torch.rand(1), drawn)
    assert [m.training for m in network.modules()] == [True, True, False, True, True, True]
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


# -- wrong inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, PlanError, r"Residual.forward\(x\) needs example inputs. Pass example_inputs=torch.randn\(1, 3, 224, 224\), say"),
        ({"example_inputs": torch.ones(2, 4, 9, 9)}, PlanError, r"fails on the example inputs \(x: float32 \[2, 4, 9, 9\]\): RuntimeError: Given groups=1"),
        ({"example_inputs": (1, 2)}, PlanError, "do not fit Residual.forward.*: too many positional arguments"),
        ({"example_inputs": {"y": torch.ones(1)}}, PlanError, "do not fit Residual.forward.*: missing a required argument: 'x'"),
        ({"example_inputs": torch.ones(2, 3, 9, 9), "exporter": "onnx"}, PlanError, "unknown exporter 'onnx'. Choose one of dynamo, torchscript"),
        ({"example_inputs": torch.ones(2, 3, 9, 9), "opset": newest_opset() + 1}, PlanError, f"opset is {newest_opset() + 1}. Choose one of 18 to {newest_opset()}"),
        ({"example_inputs": torch.ones(2, 3, 9, 9), "factory": Residual}, PlanError, "a factory is for checkpoints"),
        ({"example_inputs": torch.ones(2, 3, 9, 9), "dynamic_shapes": {"y": None}}, PlanError, "dynamic_shapes names 'y'; the arguments given are x."),
        ({"example_inputs": torch.ones(2, 3, 9, 9), "dynamic_shapes": {"x": {4: "a"}}}, PlanError, "opens axis 4 of 'x', which has 4 axes"),
        ({"example_inputs": torch.ones(2, 3, 9, 9), "dynamic_shapes": {"x": {0: "a b"}}}, PlanError, "calls an axis of 'x' 'a b'. Use letters"),
        ({"example_inputs": torch.ones(2, 3, 9, 9), "dynamic_shapes": ({}, {})}, PlanError, "has 2 entries for 1 arguments"),
        ({"example_inputs": torch.ones(2, 3, 9, 9), "dynamic_shapes": {"x": {1: "c"}}}, PlanError, "takes no other sizes of the axes that dynamic_shapes opens"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_exporting(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        convert(built("residual"), **options)


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(ModelError, match=r"cannot convert a int\. Give an nn.Module"):
        convert(3)
    with pytest.raises(ModelError, match="returns no tensor"):
        convert(Silent(), torch.ones(1))


class Silent(nn.Module):
    def forward(self, x: torch.Tensor) -> str:
        return "nothing"


# -- other sources -----------------------------------------------------------------------------------------------


def test_exported_programs_keep_their_axes_and_bring_their_inputs() -> None:
    module, example = built("tied"), NETWORKS["tied"].example()
    batch = torch.export.Dim("n")
    program = exported(module, (), example, dynamic_shapes={"ids": {0: batch}, "mask": {0: batch}})
    result = convert(program)
    assert shapes(result.model.graph.input) == {"ids": ["batch", 5], "mask": ["batch", 5]}
    assert shapes(result.model.graph.output) == {"output": ["batch", 5, 13]}
    assert set(result.names) == {"embed.weight", "up.weight", "up.bias", "down.weight", "down.bias"}
    assert result.aliases == {"head.weight": "embed.weight"}
    assert result.notes == ()
    with pytest.raises(PlanError, match="an ExportedProgram has its open axes and its graph"):
        convert(program, dynamic_shapes={"ids": {0: "n"}})


def test_exported_programs_without_open_axes_say_so(tmp_path: Path) -> None:
    program = exported(built("mlp"), (torch.randn(3, 6),))
    torch.export.save(program, tmp_path / "mlp.pt2")
    result = convert(tmp_path / "mlp.pt2")
    assert shapes(result.model.graph.input) == {"input": [3, 6]}
    assert result.notes == ("no axis is open: the program was exported so. Give dynamic_shapes to torch.export.export",)


def test_torchscript_is_read_and_traced(tmp_path: Path) -> None:
    module = scripted(built("residual").eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.save(str(tmp_path / "net.pt"))
    for source in (module, tmp_path / "net.pt", str(tmp_path / "net.pt")):
        result = convert(source, torch.randn(2, 3, 9, 9))
        assert result.exporter == "torch.onnx.export(dynamo=False)"
        assert result.names == imported("residual").names
        assert shapes(result.model.graph.input) == {"x": ["batch", 3, 9, 9]}
    with pytest.raises(PlanError, match=r"Residual.forward\(x\) needs example inputs"):
        convert(module)


def test_frozen_torchscript_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.freeze(torch.jit.script(built("mlp").eval()))
    with pytest.raises(UnsupportedError, match="Convert the network before freezing it"):
        convert(module, torch.randn(2, 6))


FACTORY = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
def make():
    return Net()
def number():
    return 3
def wants(size):
    return Net()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "their_nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("their_nets", None)


def small(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize("around", ["nothing", "state_dict", "prefix", "safetensors"])
def test_checkpoints_are_read_into_what_the_factory_makes(folder: Path, around: str) -> None:
    path, state, notes = folder / "weights.pth", small().state_dict(), ()
    if around == "state_dict":
        torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": state}, path)
    elif around == "prefix":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
        notes = ("the checkpoint's prefix 'module.' was removed",)
    elif around == "safetensors":
        path = folder / "weights.safetensors"
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(state, path)
    else:
        torch.save(state, path)
    result = convert(path, torch.randn(2, 6), factory="their_nets:make", exporter="torchscript")
    assert result.notes == notes
    tensors = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    np.testing.assert_array_equal(tensors["2.weight"], state["2.weight"].numpy())
    assert str(folder) not in sys.path


def test_a_state_dict_needs_a_factory_that_fits(folder: Path) -> None:
    state, example = dict(small().state_dict()), torch.randn(2, 6)
    assert convert(state, example, factory=small, exporter="torchscript").error < 1e-5
    for factory, said in {
        None: "the state_dict holds weights, but not the network that they belong to",
        "their_nets": "is not of the form package.module:function",
        "their_nets:none": "factory 'their_nets:none': module 'their_nets' has no attribute 'none'",
        "no_nets:make": "factory 'no_nets:make': No module named 'no_nets'",
        "their_nets:number": "factory their_nets:number makes a int, not an nn.Module",
        "their_nets:wants": "missing 1 required positional argument: 'size'. It is called without arguments",
    }.items():
        with pytest.raises(PlanError, match=said):
            convert(state, example, factory=factory)
    for wrong, said in (
        ({k: v for k, v in state.items() if k != "0.bias"}, "the state_dict lacks 0.bias. Choose the factory"),
        (state | {"4.bias": torch.ones(3)}, "has, beyond the factory's network, 4.bias"),
        (state | {"0.bias": torch.ones(3)}, "size mismatch for 0.bias"),
        ({"epoch": 3}, "the state_dict has no state_dict: its entries are epoch"),
    ):
        with pytest.raises(ModelError, match=said):
            convert(wrong, example, factory="their_nets:make")


def test_pickled_networks_need_trust(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    network = importlib.import_module("their_nets").Net()
    torch.save(network, folder / "net.pt")
    with pytest.raises(ModelError, match=r"holds Python objects besides tensors.*their_nets.Net.*pass trust=True"):
        convert(folder / "net.pt", torch.randn(2, 6))
    result = convert(folder / "net.pt", torch.randn(2, 6), trust=True, exporter="torchscript")
    assert set(result.names) == set(network.state_dict())


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_exported_programs_do_not_run_what_is_hidden_in_them(tmp_path: Path) -> None:
    path, evil, proof = tmp_path / "good.pt2", tmp_path / "evil.pt2", tmp_path / "proof"
    torch.export.save(exported(built("mlp"), (torch.randn(3, 6),)), path)
    payload = io.BytesIO()
    torch.save((Evil(proof),), payload)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(evil, "w") as target:
        for name in source.namelist():
            target.writestr(name, payload.getvalue() if "sample_inputs" in name else source.read(name))
    with pytest.raises(ModelError, match="pass trust=True"):
        convert(evil)
    assert not proof.exists()


def test_broken_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such file"):
        convert(tmp_path / "none.pt")
    for name in ("broken.pt", "broken.pt2", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"nothing in here")
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors", reason="safetensors is not installed")
        with pytest.raises(ModelError, match=f"{name}'"):
            convert(tmp_path / name, torch.ones(1), factory=small)
