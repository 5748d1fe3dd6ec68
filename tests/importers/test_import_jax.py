"""JAX models come in with their parameters' names and BatchNormalization, and compute what they computed."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

pytest.importorskip("jax2onnx", reason="needs  pip install 'spa-onnx[jax]'")
pytest.importorskip("flax", reason="needs  pip install 'spa-onnx[jax]'")
pytest.importorskip("equinox", reason="needs  pip install 'spa-onnx[jax]'")

import equinox as eqx
import jax
import jax.numpy as jnp

import spa
from spa.errors import ModelError, UnsupportedError
from spa.frameworks.jax import LAYOUT
from spa.importers.jax import convert
from spa.running.runtime import load_session, run
from tests import jax_networks as nets

NAMES = sorted(nets.CASES)
BATCH_NORMS = {"nnx_cnn": 4, "linen_cnn": 4}


def initializers(model: ModelProto):
    return {t.name: t for t in model.graph.initializer}


def operators(model: ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_an_initializer_that_leads_back_to_its_path(name: str) -> None:
    imported = nets.converted(name)
    tensors = initializers(imported.model)
    paths = {path: np.asarray(value) for path, value in nets.case(name).parameters()}
    assert sorted(imported.names.values()) == sorted(paths)
    for short, path in imported.names.items():
        value = paths[path]
        layout = next((p.value for p in tensors[short].metadata_props if p.key == LAYOUT), "[]")
        for step, argument in json.loads(layout):
            value = value.transpose(argument) if step == "transpose" else value.reshape(argument)
        np.testing.assert_array_equal(numpy_helper.to_array(tensors[short]), value)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_what_the_framework_computes_for_any_batch(name: str) -> None:
    imported = nets.converted(name)
    assert imported.kind == "jax"
    assert imported.error < 1e-5
    assert imported.notes == ()
    session = load_session(imported.model)
    (spec,) = session.get_inputs()
    assert spec.shape[0] == "batch"
    x = np.concatenate([nets.case(name).x, nets.case(name).x[::-1], nets.case(name).x[:1]])
    assert run(session, {spec.name: x})[0].shape[0] == 5


@pytest.mark.parametrize("name", NAMES)
def test_batch_normalization_is_kept(name: str) -> None:
    assert operators(nets.converted(name).model).count("BatchNormalization") == BATCH_NORMS.get(name, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_model_is_pruned(name: str) -> None:
    result = spa.prune(nets.converted(name).model, criterion="l2", ratio=0.4, cross_norm=True, round_to=1)
    assert result.report.after.macs < 0.65 * result.report.before.macs


def test_a_module_in_training_mode_is_converted_in_inference_mode_and_stays_as_it_was() -> None:
    source = nets.case("nnx_cnn").source
    before = jax.tree_util.tree_leaves(source)
    nets.converted("nnx_cnn")
    assert not source.blocks[0].norm1.use_running_average
    assert not source.drop.deterministic
    assert all(a is b for a, b in zip(before, jax.tree_util.tree_leaves(source), strict=True))


def test_flax_kernels_lie_as_onnx_wants_them() -> None:
    weight = initializers(nets.converted("nnx_cnn").model)["stem.kernel"]
    assert list(weight.dims) == [12, 3, 3, 3]
    assert [p.value for p in weight.metadata_props if p.key == LAYOUT] == ['[["transpose", [3, 2, 0, 1]]]']


class Normalised(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Conv2d

    def __init__(self, key) -> None:
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 16, 3, padding=1, key=first)
        self.norm = eqx.nn.BatchNorm(16, "batch", mode="ema")
        self.head = eqx.nn.Conv2d(16, 5, 1, key=second)

    def __call__(self, x, state):
        y, _ = self.norm(self.conv(x), state)
        return self.head(jax.nn.relu(y))


def test_batch_normalization_of_equinox_is_arithmetic_that_is_pruned_all_the_same() -> None:
    module, state = eqx.nn.make_with_state(Normalised)(jax.random.key(0))
    module, state = eqx.nn.inference_mode(module), jax.tree_util.tree_map(lambda a: a + 0.25, state)

    def apply(params, x):
        return jax.vmap(params[0], in_axes=(0, None), axis_name="batch")(x, params[1])

    imported = convert(apply, nets.first_channels(nets.images()), params=(module, state))
    assert "BatchNormalization" not in operators(imported.model)
    assert imported.names["0.norm.weight"] == "[0].norm.weight"
    result = spa.prune(imported.model, criterion="l2", ratio=0.5, round_to=1)
    assert initializers(result.model)["0.norm.weight"].dims[0] == 8


def test_arguments_may_be_trees_and_outputs_too() -> None:
    a, b = nets.images(seed=1), nets.images(seed=2)
    imported = convert(lambda pair, z: {"sum": pair["a"] + pair["b"][0] * z, "z": jnp.tanh(z)}, ({"a": a, "b": [b]}, a))
    assert [i.name for i in imported.model.graph.input] == ["pair.a", "pair.b.0", "z"]
    assert len(imported.model.graph.output) == 2
    assert imported.notes == ("the function's constants have no names: give params=",)


def test_further_arguments_are_passed_on() -> None:
    made = nets.case("linen_cnn")
    imported = convert(made.source, made.x, **made.options, kwargs={"train": False})
    assert operators(imported.model) == operators(nets.converted("linen_cnn").model)


def test_positional_arguments_of_pools_are_understood() -> None:
    assert "MaxPool" in operators(nets.converted("nnx_cnn").model)  # written nnx.max_pool(x, (2, 2), (2, 2))


def test_other_axes_can_be_open() -> None:
    imported = convert(jnp.tanh, nets.tokens().astype(np.float32), axes={0: {0: "batch", 1: "time"}})
    assert load_session(imported.model).get_inputs()[0].shape == ["batch", "time"]


def test_a_batch_size_that_the_code_fixes_is_told() -> None:
    imported = convert(lambda p, x: x.reshape(2, -1) @ p, nets.tokens().astype(np.float32), params=jnp.ones((6, 3)))
    assert load_session(imported.model).get_inputs()[0].shape == [2, 6]
    assert imported.notes[0].startswith("the batch size is fixed: jax2onnx cannot export <lambda>: TypeError")


def test_an_axis_that_was_asked_for_and_cannot_be_open_is_refused() -> None:
    x = nets.tokens().astype(np.float32)
    with pytest.raises(UnsupportedError, match="jax2onnx cannot export <lambda>: TypeError"):
        convert(lambda p, x: x.reshape(2, -1) @ p, x, params=jnp.ones((6, 3)), axes={0: {0: "n"}})
    with pytest.raises(ModelError, match=r"axes names axes \[0\] of input 1; the inputs have shapes \[\[2, 6\]\]"):
        convert(jnp.tanh, x, axes={1: {0: "n"}})


def test_missing_and_wrong_inputs_and_parameters_are_refused() -> None:
    made = nets.case("linen_cnn")
    with pytest.raises(ModelError, match="LinenCnn needs example inputs"):
        convert(made.source, **made.options)
    with pytest.raises(ModelError, match=r"LinenCnn is a flax linen module. Give its variables: params=variables"):
        convert(made.source, made.x)
    with pytest.raises(ModelError, match=r"NnxCnn holds its parameters itself. Leave out params="):
        convert(nets.case("nnx_cnn").source, made.x, params={})
    with pytest.raises(ModelError, match=r"EqxCnn does not run on float32\[2, 3, 8, 8\]: .*vmap=True"):
        convert(nets.case("eqx_cnn").source, nets.case("eqx_cnn").x)
    with pytest.raises(ModelError, match="an object of type int is no JAX model"):
        convert(3, made.x)


def test_an_operation_that_jax2onnx_refuses_is_reported_with_its_reason() -> None:
    with pytest.raises(
        UnsupportedError, match=r"jax2onnx cannot export <lambda>: NotImplementedError: eigh .*Export without"
    ):
        convert(lambda x: jnp.linalg.eigh(x @ x.swapaxes(1, 2))[0], np.ones((2, 4, 4), np.float32))


def test_a_model_that_computes_something_else_is_refused() -> None:
    calls = []

    def restless(params, x):
        calls.append(1)
        return x @ params + len(calls)

    with pytest.raises(ModelError, match=r"the exported model differs from restless by .* more than 0\.001"):
        convert(restless, np.ones((2, 6), np.float32), params=jnp.ones((6, 3)))


def test_a_missing_package_is_reported_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UnsupportedError, match=r"jax2onnx cannot be imported .* pip install 'spa-onnx\[jax\]'"):
        convert(jnp.tanh, np.ones((2, 6), np.float32))
