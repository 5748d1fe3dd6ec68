"""Pruned modules of flax and equinox, and trees of variables, in a file and again from it, without tracing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax2onnx", reason="needs  pip install 'spa-onnx[jax]'")
pytest.importorskip("flax", reason="needs  pip install 'spa-onnx[jax]'")
pytest.importorskip("equinox", reason="needs  pip install 'spa-onnx[jax]'")

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

import spa
from spa.errors import ModelError, OptionError, UnreadableError, UnsupportedError
from spa.exporters.flax_linen import resized
from spa.exporters.jax_saving import _layers, _plain
from spa.frameworks.jax import is_parameter
from tests import jax_networks as nets
from tests.exporters.test_export_jax import PLAIN

X = np.random.default_rng(0).standard_normal((3, 9)).astype(np.float32)


class NnxNet(nnx.Module):
    def __init__(self, width: int = 24, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(9, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.second = nnx.Linear(width, 5, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.norm(self.first(x))))


class EqxNet(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    factor: float

    def __init__(self, width: int = 24, seed: int = 0) -> None:
        keys = jax.random.split(jax.random.key(seed))
        self.first = eqx.nn.Linear(9, width, use_bias=False, key=keys[0])
        self.second = eqx.nn.Linear(width, 5, key=keys[1])
        self.factor = 0.5

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.factor * self.second(jax.nn.relu(self.first(x)))


def pruned(net: nnx.Module | eqx.Module) -> nnx.Module | eqx.Module:
    options = {"vmap": True} if isinstance(net, EqxNet) else {}
    request = {"ratio": 0.4, "of": "params", "criterion": "l2", "round_to": 1}
    return spa.prune(net, **request, example_inputs=X, convert_options=options).pruned


def applied(net: nnx.Module | eqx.Module) -> np.ndarray:
    if isinstance(net, NnxNet):
        net = nnx.clone(net)
        net.eval()
        return np.asarray(net(X))
    return np.asarray(jax.vmap(net)(X))


@pytest.mark.parametrize("kind", [NnxNet, EqxNet])
def test_a_fresh_module_becomes_the_pruned_one(tmp_path: Path, kind: type) -> None:
    small = pruned(kind())
    assert len(jax.tree.leaves(eqx.filter(small.first, eqx.is_array) if kind is EqxNet else nnx.state(small.first))) > 0
    spa.save(small, tmp_path / "small.npz")
    fresh = kind(seed=7)
    again = spa.load(tmp_path / "small.npz", fresh)
    assert type(again) is kind
    assert np.array_equal(applied(again), applied(small))
    assert again.first.out_features == small.first.out_features < fresh.first.out_features == 24
    assert not np.array_equal(applied(fresh), applied(small))
    assert [f.name for f in tmp_path.iterdir()] == ["small.npz"]


def arrays_of(net: nnx.Module | eqx.Module) -> dict[str, np.ndarray]:
    tree = nnx.state(net, nnx.Not(nnx.RngState)) if isinstance(net, nnx.Module) else net
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in pairs if is_parameter(value)}


def cut(source: nnx.Module | eqx.Module, case: nets.Case, ratio: float, **options: Any) -> nnx.Module | eqx.Module:
    request = {"ratio": ratio, "of": "params", "criterion": "l2", "round_to": 1, **options}
    return spa.prune(source, example_inputs=case.x, convert_options=case.options, **request).pruned


def sizes_of(net: nnx.Module | eqx.Module) -> dict[str, dict[str, Any]]:
    return {path: _plain(layer) for path, layer in _layers(net, "nnx" if isinstance(net, nnx.Module) else "equinox")}


@pytest.mark.parametrize("name", ["nnx", "eqx", "nnx_cnn", "nnx_transformer", "eqx_transformer"])
def test_a_fresh_module_gets_the_widths_and_keeps_its_own_values(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores by weights alone change no value that stays: dense ones at the kept indices are the pruned ones."""
    case = PLAIN[name]() if name in PLAIN else nets.case(name)
    small = cut(case.source, case, 0.3)
    if name in PLAIN:  # once more: what is kept is counted from the fresh module
        once, small = small, cut(small, case, 0.3)
        assert sum(a.size for a in arrays_of(small).values()) < sum(a.size for a in arrays_of(once).values())
    spa.save(small, tmp_path / "small.npz")
    loaded = spa.load(tmp_path / "small.npz", case.source)
    with monkeypatch.context() as patch:
        patch.setattr(type(case.source), "__call__", None)  # nothing runs it
        made = [spa.narrow(case.source, pruned) for pruned in (small, tmp_path / "small.npz", loaded)]
        made.append(spa.narrow(case.source, made[0]))
    for again in made:
        assert type(again) is type(case.source)
        found, wanted = arrays_of(again), arrays_of(small)
        assert found.keys() == wanted.keys()
        for path, value in found.items():
            if "query" in path:  # the pruned one's make up for the scale of attention, which follows the size of a head
                assert value.shape == wanted[path].shape
            else:
                assert np.array_equal(value, wanted[path]), path
        assert sizes_of(again) == sizes_of(small) != sizes_of(case.source)


@pytest.mark.parametrize("kind", ["nnx", "eqx"])
def test_biases_that_reconstruction_made_begin_with_zeros(kind: str) -> None:
    case = PLAIN[kind]()
    once = cut(case.source, case, 0.3, criterion="flap", samples=16)
    small = cut(once, case, 0.3, criterion="flap", samples=16)
    assert not np.array_equal(small.second.bias, 0 * small.second.bias)
    again = spa.narrow(case.source, small)
    assert {p: a.shape for p, a in arrays_of(again).items()} == {p: a.shape for p, a in arrays_of(small).items()}
    assert again.second.use_bias and not np.any(again.second.bias)


def test_what_is_no_record_of_the_same_module_narrows_nothing(tmp_path: Path) -> None:
    small = pruned(EqxNet())
    spa.save(small, tmp_path / "small.npz")
    for given, said in ((small, "the pruned module is"), (tmp_path / "small.npz", r"small\.npz' holds")):
        with pytest.raises(ModelError, match=f"{said} a EqxNet, and a NnxNet is given"):
            spa.narrow(NnxNet(), given)
    with pytest.raises(ModelError, match=r"the module's \.first\.weight has shape \[30, 9\], not \[24, 9\]"):
        spa.narrow(EqxNet(width=30), small)
    with pytest.raises(ModelError, match=r"\.first\.bias is in the given module alone"):
        spa.narrow(eqx.tree_at(lambda n: n.first.bias, EqxNet(), jnp.ones(24), is_leaf=lambda x: x is None), small)
    trained = jax.tree.map(lambda leaf: leaf, small)  # equinox makes another object, of the fields alone
    with pytest.raises(UnsupportedError, match="this EqxNet carries no record of a pruning"):
        spa.narrow(EqxNet(), trained)
    spa.save(trained, tmp_path / "trained.npz")
    with pytest.raises(UnsupportedError, match=r"trained\.npz' has no record of a pruning"):
        spa.narrow(EqxNet(), tmp_path / "trained.npz")
    object.__setattr__(trained, "spa_narrowing", "{}")
    with pytest.raises(ModelError, match="the record of the pruning cannot be read"):
        spa.narrow(EqxNet(), trained)
    with pytest.raises(OptionError, match="cannot narrow a dict"):
        spa.narrow({"a": jnp.ones(3)}, small)


def test_training_in_place_keeps_the_record() -> None:
    small = pruned(NnxNet())
    gradients = nnx.grad(lambda net: jnp.sum(jnp.square(net(X))))(small)
    nnx.update(small, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(small, nnx.Param), gradients))
    split = nnx.merge(*nnx.split(small))
    assert spa.narrow(NnxNet(seed=7), split).first.out_features == small.first.out_features


def test_training_biases_and_types_come_back(tmp_path: Path) -> None:
    small = pruned(EqxNet())
    bias = jnp.arange(small.first.out_features, dtype=jnp.float32)
    small = eqx.tree_at(lambda n: n.first.bias, small, bias, is_leaf=lambda x: x is None)
    object.__setattr__(small.first, "use_bias", True)  # as reconstruction gives one
    small = eqx.tree_at(lambda n: n.second.weight, small, small.second.weight.astype(jnp.bfloat16))
    spa.save(small, tmp_path / "small.npz")
    again = spa.load(tmp_path / "small.npz", EqxNet())
    assert np.array_equal(again.first.bias, bias) and again.first.use_bias is True
    assert again.second.weight.dtype == jnp.bfloat16
    assert np.array_equal(applied(again), applied(small))
    net = pruned(NnxNet())
    net.second.bias, net.second.use_bias = nnx.Param(jnp.ones(5)), True
    net(X)  # statistics
    spa.save(net, tmp_path / "net.npz")
    assert np.array_equal(applied(spa.load(tmp_path / "net.npz", NnxNet())), applied(net))


def test_variables_of_a_linen_module_need_no_module(tmp_path: Path) -> None:
    case = nets.case("linen_cnn")
    request = {"ratio": 0.4, "criterion": "l2", "round_to": 1, "example_inputs": case.x}
    variables = spa.prune(case.source, **request, convert_options=case.options).pruned
    spa.save(variables, tmp_path / "small.npz")
    again = spa.load(tmp_path / "small.npz")
    assert jax.tree.map(np.shape, again) == jax.tree.map(np.shape, variables)
    net = resized(case.source)
    assert np.array_equal(net.apply(again, case.x), net.apply(variables, case.x))


def test_another_process_needs_the_class_and_the_file_alone(tmp_path: Path) -> None:
    net = eqx.tree_at(lambda n: n.weight, eqx.nn.Linear(3, 2, key=jax.random.key(0)), jnp.ones((2, 3)))
    spa.save(net, tmp_path / "small.npz")
    code = (
        "import sys, jax, equinox as eqx, spa\n"
        "fresh = eqx.nn.Linear(3, 5, key=jax.random.key(3))\n"
        "net = spa.load(sys.argv[1], fresh)\n"
        "print(net.out_features, net(jax.numpy.ones(3)).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "small.npz")], capture_output=True, text=True)
    assert done.stdout.strip() == f"2 {net(jnp.ones(3)).tolist()}", done.stderr


def test_what_does_not_fit_is_refused_with_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "small.npz"
    spa.save(NnxNet(), file)
    with pytest.raises(ModelError, match=r"holds a NnxNet, and a EqxNet is given\. .* made with the same arguments"):
        spa.load(file, EqxNet())
    with pytest.raises(ModelError, match=r"holds a NnxNet\. Give one as its constructor makes it"):
        spa.load(file)
    spa.save(EqxNet(), file)
    other = eqx.tree_at(lambda n: n.second, EqxNet(), eqx.nn.Linear(24, 5, use_bias=False, key=jax.random.key(0)))
    spa.save(other, tmp_path / "other.npz")
    with pytest.raises(ModelError, match=r"\.second\.bias is in the module alone"):
        spa.load(tmp_path / "other.npz", EqxNet())
    with pytest.raises(UnreadableError):
        spa.load(tmp_path / "none.npz", EqxNet())
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    for name in ("text", "arrays"):
        with pytest.raises(ModelError, match=r"is no file of spa\.save"):
            spa.load(tmp_path / f"{name}.npz", EqxNet())
    with pytest.raises(UnsupportedError, match=r"'a' is no array"):
        spa.save({"a": 3}, file)
    with pytest.raises(UnsupportedError, match=r"has no arrays of its own"):
        spa.save(lambda params, x: x, file)
    with pytest.raises(OptionError, match="Give a PyTorch, flax or equinox module, or a Keras model"):
        spa.save("net", file)
