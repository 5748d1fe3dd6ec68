"""ONNX graphs as PyTorch modules: every architecture against onnxruntime, what is a parameter, and training."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from models.builders import ZOO
from spa.errors import UnsupportedError
from spa.exporters.pytorch import graph_module, operator, save, store
from spa.exporters.pytorch.check import difference, made_up, outputs_of, reference, tolerance
from spa.exporters.pytorch.operators import tensor
from spa.model.io import load
from spa.running.runtime import load_session, run
from tests.zoo import built

MODELS = Path(__file__).parents[2] / "models"
QUICK = """
bilstm diffusion_unet gpt2 gru handmade_contrib handmade_group_norm handmade_grouped handmade_if handmade_loop
handmade_old handmade_qdq handmade_qlinear handmade_residual_fp16 handmade_rms_attention handmade_scan llama
mobilenet_v3 resnet_basic resnet_equal_constants shufflenet_v2 super_resolution tied_embeddings unet vit_torchvision
yolo
""".split()
INTEGER = {"handmade_qdq", "handmade_qlinear"}  # all of their weights are integers: nothing to train
UNTAKEN = {"handmade_if"}  # one branch is not run, so its weights get no gradient
EACH = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in sorted(ZOO)]


def fed(feeds: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: tensor(value) for name, value in feeds.items()}


@pytest.mark.parametrize("name", EACH)
def test_every_architecture_gives_what_onnxruntime_gives_and_has_finite_gradients(name: str) -> None:
    model = built(name)
    feeds = made_up(model, None)
    module = graph_module(model)
    assert difference(outputs_of(module, (), fed(feeds)), reference(model, None, feeds)) < tolerance(model)
    assert module.training
    if name in INTEGER:
        assert not list(module.parameters())
        return
    outputs = module.eval()(**fed(feeds))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(o.float().square().mean() for o in outputs if o.is_floating_point()).backward()
    gradients = {key: p.grad for key, p in module.named_parameters()}
    assert name in UNTAKEN or all(g is not None for g in gradients.values())
    assert all(g.isfinite().all() for g in gradients.values() if g is not None)
    assert any(g.abs().max() > 0 for g in gradients.values() if g is not None)


@pytest.mark.parametrize("name", [n for n in QUICK if n not in UNTAKEN])  # an If looks at data
def test_everything_follows_the_module_to_its_device(name: str) -> None:
    model = built(name)
    feeds = made_up(model, None)
    module = graph_module(model).eval()
    wanted = outputs_of(module, (), fed(feeds))
    outputs = module.to("meta")(**{n: v.to("meta") for n, v in fed(feeds).items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [(o.device.type, tuple(o.shape)) for o in outputs] == [("meta", w.shape) for w in wanted]


# -- parameters --------------------------------------------------------------------------------------------------


def test_the_state_dict_has_the_initializers_names_and_values() -> None:
    model = load(MODELS / "digits_resnet.onnx").model
    module = graph_module(model)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    merged = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Identity"}
    assert merged  # two biases of equal value, which TorchScript's exporter wrote once
    state = module.state_dict()
    assert set(state) == set(stored) | set(merged)
    assert all(np.array_equal(v, stored[merged.get(k, k)]) for k, v in state.items())
    buffers = dict(module.named_buffers())
    assert all(("running" in key) == (key in buffers) for key in state)
    assert module.get_submodule("layer1.0") is not None


def test_names_of_the_frameworks_are_taken_and_clashes_get_an_underscore() -> None:
    model = parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        net (float[n, 3] x) => (float[n, 3] y) { a = Mul (x, w) b = Add (a, c) d = Mul (b, e) y = Add (d, f) }""")
    for at, name in enumerate("wcef"):
        model.graph.initializer.append(numpy_helper.from_array(np.full(3, at, np.float32), name))
    names = {"w": "block.weight", "c": "block.weight.bias", "e": "train", "f": "block.0.forward"}
    module = graph_module(model, names=names)
    assert dict(module.keys) == {
        "w": "block.weight",
        "c": "block.weight_.bias",
        "e": "train_",
        "f": "block.0.forward_",
    }
    assert set(module.state_dict()) == set(module.keys.values())


def test_tied_weights_stay_one_parameter() -> None:
    model = built("tied_embeddings")
    module = graph_module(model)
    tied = [t.name for t in model.graph.initializer if sum(t.name in n.input for n in model.graph.node) > 1]
    assert len([key for key, _ in module.named_parameters() if key in tied]) == len(tied) > 0


def test_statistics_masks_and_numbers_are_no_parameters() -> None:
    model = parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        net (float[n, 3, 4] x, int64[n] i) => (float[n, 3, 4] y) {
            a = BatchNormalization (x, scale, bias, mean, var) b = Add (a, mask) c = Mul (b, half)
            d = Clip (c, low) e = Gather (table, i) f = Add (d, e) y = Add (f, own) }""")
    values = {n: np.ones(3) for n in ("scale", "bias", "mean", "var")}
    values |= {"mask": np.full((1, 4), -np.inf), "half": np.array(0.5), "low": np.array(-1.0), "own": np.ones((3, 4))}
    values["table"] = np.ones((5, 3, 4))
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    module = graph_module(model, buffers=["own"])
    assert {key for key, _ in module.named_parameters()} == {"scale", "bias", "table"}
    assert {key for key, _ in module.named_buffers()} == {"mean", "var", "mask", "own"}


def test_a_statistic_that_an_exporter_merged_with_another_vector_is_its_own() -> None:
    model = parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        net (float[n, 3, 4] x) => (float[n, 3, 4] y) {
            a = BatchNormalization (x, one, zero, zero, one) y = BatchNormalization (a, one, zero, zero, one2) }""")
    for name, value in (("one", 1), ("zero", 0), ("one2", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.full(3, value, np.float32), name))
    before = model.SerializeToString()
    module = graph_module(model).train()
    module(torch.randn(8, 3, 4)).square().sum().backward()
    assert model.SerializeToString() == before
    assert {key for key, _ in module.named_parameters()} == {"one", "zero"}
    means = [b for key, b in module.named_buffers() if key.startswith("zero")]
    assert len(means) == 2
    assert not torch.equal(*means)


def test_modules_can_be_copied_and_pickled() -> None:
    model = built("handmade_if")
    feeds = made_up(model, None)
    module = graph_module(model)
    wanted = outputs_of(module, (), fed(feeds))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert difference(outputs_of(twin, (), fed(feeds)), wanted) == 0


def test_forward_takes_inputs_by_place_or_by_name_and_says_what_is_missing() -> None:
    module = graph_module(built("siamese")).eval()
    a, b = module.input_names
    x, y = torch.randn(2, 2, 3, 10, 10)
    assert torch.equal(module(x, y), module(**{b: y, a: x}))
    assert torch.equal(module(x, y), module(x, **{b: y}))
    with pytest.raises(TypeError, match=f"forward takes {a}, {b}; got 1 by place"):
        module(x)


# -- training ----------------------------------------------------------------------------------------------------


def digits(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(MODELS / "digits_train.npz") as data:
        return torch.from_numpy(data["input"][:count]), torch.from_numpy(data["label"][:count])


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit", "digits_lstm"])
def test_a_step_down_the_gradient_lowers_the_loss(name: str) -> None:
    torch.manual_seed(0)
    module = graph_module(load(MODELS / f"{name}.onnx").model).eval()
    x, y = digits(64)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.03 * torch.randn_like(p)
    losses = []
    optimiser = torch.optim.SGD(module.parameters(), 1e-3)
    for _ in range(2):
        loss = F.cross_entropy(module(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_batch_normalization_follows_the_batches_while_training_as_pytorchs_does() -> None:
    torch.manual_seed(0)
    ours = graph_module(
        parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        net (float[n, 3, 4] x) => (float[n, 3, 4] y) <float[3] s = {1, 2, 3}, float[3] b = {4, 5, 6},
            float[3] m = {7, 8, 9}, float[3] v = {1, 2, 3}> {
            y = BatchNormalization <momentum = 0.8> (x, s, b, m, v) }""")
    )
    theirs = torch.nn.BatchNorm1d(3, momentum=0.2)
    theirs.load_state_dict(
        dict(zip(["weight", "bias", "running_mean", "running_var"], ours.state_dict().values(), strict=True)), False
    )
    x = torch.randn(5, 3, 4)
    for train in (True, False):
        torch.testing.assert_close(ours.train(train)(x), theirs.train(train)(x))
        torch.testing.assert_close(ours.state_dict()["m"], theirs.running_mean)
        torch.testing.assert_close(ours.state_dict()["v"], theirs.running_var)


def test_dropout_drops_while_training() -> None:
    module = graph_module(built("handmade_old"))
    x = torch.randn(4, 3, 9, 9)
    module.eval()
    assert torch.equal(module(x), module(x))
    drops = parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        net (float[n] x) => (float[n] y) <float r = {0.25}> { y = Dropout (x, r) }""")
    y = graph_module(drops)(torch.ones(4000))
    assert 0.2 < float((y == 0).float().mean()) < 0.3
    assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 4 / 3))


def test_stored_weights_come_out_of_onnxruntime() -> None:
    model = load(MODELS / "digits_resnet.onnx").model
    module = graph_module(model).eval()
    assert store(module, model).graph.node == store(graph_module(model), model).graph.node
    with torch.no_grad():
        for p in module.parameters():
            p *= 1 + 0.1 * torch.rand_like(p)
    feeds = made_up(model, None)
    before = model.SerializeToString()
    stored = store(module, model)
    assert model.SerializeToString() == before
    assert difference(outputs_of(module, (), fed(feeds)), reference(stored, None, feeds)) < 1e-5
    assert difference(reference(stored, None, feeds), reference(model, None, feeds)) > 1e-3


# -- what is refused ---------------------------------------------------------------------------------------------


def single(
    op: str, domain: str = "", inputs: int = 1, kind: int = TensorProto.FLOAT, **attributes: object
) -> ModelProto:
    node = helper.make_node(op, ["x"] * inputs, ["y"], name="tested", domain=domain, **attributes)
    x, y = (helper.make_tensor_value_info(n, kind, [2, 3]) for n in "xy")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("my.domain", 1)]
    return helper.make_model(helper.make_graph([node], "net", [x], [y]), opset_imports=opsets, ir_version=10)


def test_an_operator_that_is_not_covered_is_named_with_its_node_and_a_remedy() -> None:
    said = r"MyOp 'tested': operator my\.domain::MyOp has no counterpart .*operator\('my\.domain::MyOp'\)"
    with pytest.raises(UnsupportedError, match=said):
        graph_module(single("MyOp", "my.domain"))
    with pytest.raises(UnsupportedError, match=r"Cast 'tested': elements of type FLOAT8E4M3FN of Cast has no"):
        graph_module(single("Cast", to=TensorProto.FLOAT8E4M3FN))
    with pytest.raises(UnsupportedError, match=r"input 'x' has elements of type UINT16, with which PyTorch does not"):
        graph_module(single("Relu", kind=TensorProto.UINT16))


def test_users_teach_it_their_own_operators() -> None:
    @operator("my.domain::Twice")
    def twice(node, x):
        return 2 * x

    x = torch.randn(2, 3)
    assert torch.equal(graph_module(single("Twice", "my.domain"))(x), 2 * x)
    with pytest.raises(ValueError, match=r"my\.domain::Twice has a function already"):
        operator("my.domain::Twice")(twice)


def test_without_pytorch_the_extra_is_named_and_the_core_works() -> None:
    program = """
import sys
sys.modules["torch"] = None
import spa, spa.api, spa.exporters.onnx
try:
    import spa.exporters.pytorch
except spa.SpaError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "torch cannot be imported" in said
    assert said.endswith("Run  pip install 'spa-onnx[torch]'.\n")


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch.export warns about parts of itself
@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit"])
def test_a_saved_program_runs_without_this_package_on_any_batch(name: str, tmp_path: Path) -> None:
    path = MODELS / f"{name}.onnx"
    file = save(load(path).model, tmp_path / "out")
    assert file == tmp_path / "out" / "model.pt2"
    program = torch.export.load(file)
    x, _ = digits(7)
    wanted = run(load_session(path), {"input": x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(program.module()(x).numpy(), wanted, atol=1e-4)
    assert set(program.state_dict) == set(graph_module(load(path).model).state_dict())


@pytest.mark.filterwarnings("ignore")
def test_a_program_that_data_decide_about_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"torch\.export cannot take the network: .* Export to ONNX instead"):
        save(built("handmade_if"), tmp_path)
    assert list(tmp_path.iterdir()) == []
