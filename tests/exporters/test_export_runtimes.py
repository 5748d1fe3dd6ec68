"""Exports for runtimes: what comes out computes the same, and what cannot be made so is refused with its reason."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

import spa
from spa.errors import ModelError, PlanError, SpaError, UnsupportedError
from spa.exporters import checks, openvino, ort, variants
from spa.exporters.onnx import write
from spa.model.io import Source
from spa.model.versions import newest_ir, newest_opset
from spa.running.runtime import load_session, run
from tests.oracle import Net, random_array

MODELS = Path(__file__).parents[2] / "models"
RESNET = MODELS / "digits_resnet.onnx"


def softmax(opset: int) -> ModelProto:
    """Softmax before opset 13 normalises over all axes from the given one on, and from then on over that one."""
    net = Net(opset=opset)
    return net.model(net.node("Softmax", net.conv(net.input("x", ["n", 3, 5, 7]), 3, 2), axis=1))


def normalised() -> ModelProto:
    net = Net(opset=17)
    h = net.batch_norm(net.conv(net.input("x", ["n", 3, 5, 7]), 3, 11), 11)
    return net.model(net.node("Relu", h))


def external(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(onnx.load(RESNET), path, save_as_external_data=True, location="weights", size_threshold=1024)
    return path


def same(a: object, b: object, limit: float = 1e-6) -> bool:
    report = spa.verify(a, b)  # type: ignore[arg-type]
    return report.same_interface and all(o.relative_l2 is not None and o.relative_l2 <= limit for o in report.outputs)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- onnx -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [18, 21, 26])
def test_a_newer_opset_computes_the_same_and_keeps_names_and_metadata(tmp_path: Path, opset: int) -> None:
    path = spa.export(RESNET, "onnx", tmp_path / "m.onnx", opset=opset)
    before, after = onnx.load(RESNET), onnx.load(path)
    assert [(o.domain, o.version) for o in after.opset_import] == [("", opset)]
    assert [t.name for t in after.graph.initializer] == [t.name for t in before.graph.initializer]
    assert [p.key for p in after.metadata_props] == [p.key for p in before.metadata_props]
    assert after.graph.input[0].type == before.graph.input[0].type
    assert same(RESNET, path, 0.0)
    assert names(tmp_path) == ["m.onnx"]


def test_an_operator_whose_meaning_changed_is_expressed_anew_upward(tmp_path: Path) -> None:
    path = write(Source(softmax(11)), tmp_path / "m.onnx", opset=17)
    assert "Flatten" in [n.op_type for n in onnx.load(path).graph.node]
    assert same(softmax(11), path)


def test_an_opset_can_be_lowered_where_no_operator_changed(tmp_path: Path) -> None:
    path = write(Source(softmax(11)), tmp_path / "m.onnx", opset=9)
    assert onnx.load(path).opset_import[0].version == 9
    assert same(softmax(11), path)


def test_a_conversion_that_changes_outputs_is_refused(tmp_path: Path) -> None:
    # onnx's own conversion of Softmax from 13 to 12 only changes the number.
    with pytest.raises(
        PlanError, match=r"output 'softmax_\d+' changes by 0\.\d+ of its size\. Keep opset 13, or export"
    ):
        write(Source(softmax(13)), tmp_path / "m.onnx", opset=11)
    assert names(tmp_path) == []


def test_a_conversion_that_onnx_lacks_is_refused_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"to opset 13: No Previous Version of LayerNormalization exists\. Keep opset 17"
    ):
        spa.export(MODELS / "digits_vit.onnx", "onnx", tmp_path / "m.onnx", opset=13)
    assert names(tmp_path) == []


@pytest.mark.parametrize("opset", [6, newest_opset() + 1])
def test_an_opset_that_cannot_be_checked_is_refused(tmp_path: Path, opset: int) -> None:
    with pytest.raises(PlanError, match=f"opset {opset} is out of range: 7 to {newest_opset()}"):
        write(Source(normalised()), tmp_path / "m.onnx", opset=opset)


def test_the_ir_version_is_written_and_the_rest_stays(tmp_path: Path) -> None:
    path = write(Source(normalised()), tmp_path / "m.onnx", ir_version=7)
    expected = normalised()
    expected.ir_version = 7
    assert onnx.load(path) == expected


@pytest.mark.parametrize("version", [3, newest_ir() + 1])
def test_an_ir_version_that_cannot_be_checked_is_refused(tmp_path: Path, version: int) -> None:
    expected = rf"IR version {version} is out of range: 4 to {newest_ir()} can be checked\. Keep IR version 8"
    with pytest.raises(PlanError, match=expected):
        spa.export(RESNET, "onnx", tmp_path / "m.onnx", ir_version=version)
    assert names(tmp_path) == []


def test_an_ir_version_that_the_model_does_not_fit_is_refused_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "newest_ir", lambda: 99)
    with pytest.raises(PlanError, match=r"IR version 99 is refused: .*99.*Keep IR version 8"):
        spa.export(RESNET, "onnx", tmp_path / "m.onnx", ir_version=99)
    assert names(tmp_path) == []


def test_the_optimised_graph_is_smaller_and_stays_within_the_standard(tmp_path: Path) -> None:
    path = write(Source(normalised()), tmp_path / "m.onnx", optimise=True)
    after = onnx.load(path)
    assert [n.op_type for n in after.graph.node] == ["Conv", "Relu"]
    assert [(o.domain, o.version) for o in after.opset_import] == [("", 17)]
    assert same(normalised(), path)


def test_optimising_keeps_a_zero_pad_apart_from_max_pool(tmp_path: Path) -> None:
    """MaxPool pads with the lowest number; onnxruntime 1.31 would merge the two."""
    net = Net(opset=17)
    x = net.node("Pad", net.input("x", [1, 3, 5, 7]), net.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])))
    model = net.model(net.node("MaxPool", net.node("Neg", net.node("Abs", x)), kernel_shape=[3, 3]))
    plain = Net(opset=17)
    y = plain.node("Pad", plain.input("x", [1, 3, 5, 7]), plain.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])))
    direct = plain.model(plain.node("MaxPool", y, kernel_shape=[3, 3]))
    for each in (model, direct):
        assert same(each, write(Source(each), tmp_path / "m.onnx", optimise=True), 0.0)


def test_all_three_go_together(tmp_path: Path) -> None:
    path = write(Source(normalised()), tmp_path / "m.onnx", opset=21, optimise=True, ir_version=10)
    after = onnx.load(path)
    assert (after.opset_import[0].version, after.ir_version, len(after.graph.node)) == (21, 10, 2)
    assert same(normalised(), path)


@pytest.mark.parametrize(
    "options", [{"opset": 21}, {"optimise": True}, {"ir_version": 7}, {"opset": 18, "optimise": True}]
)
def test_external_data_stays_external_and_moves_to_the_targets_name(tmp_path: Path, options: dict[str, object]) -> None:
    source = external(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    path = spa.export(source, "onnx", out / "m.onnx", **options)
    assert names(out) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < 50_000
    shutil.rmtree(tmp_path / "in")
    assert same(RESNET, path)


def test_external_is_an_option(tmp_path: Path) -> None:
    spa.export(RESNET, "onnx", tmp_path / "m.onnx", external=True, opset=21)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_the_source_is_not_overwritten_without_force(tmp_path: Path) -> None:
    path = Path(shutil.copy(RESNET, tmp_path / "m.onnx"))
    with pytest.raises(PlanError, match="is the input"):
        spa.export(path, "onnx", path, opset=21)
    spa.export(path, "onnx", path, opset=21, force=True)
    assert onnx.load(path).opset_import[0].version == 21


def test_a_model_without_options_is_written_as_it_is(tmp_path: Path) -> None:
    assert onnx.load(write(Source(normalised()), tmp_path / "m.onnx")) == normalised()


# -- the comparison -------------------------------------------------------------------------------------------------


def scaled(factor: float, cast: int | None = None) -> ModelProto:
    net = Net(opset=17)
    y = net.node("Mul", net.gemm(net.input("x", ["n", 3]), 3, 5), net.constant(factor))
    model = net.model(net.node("Cast", y, to=cast) if cast else y)
    model.graph.node[-1].output[0] = model.graph.output[0].name = "y"
    return model


@pytest.mark.parametrize(
    ("factor", "found"), [(1.0, None), (1 + 5e-6, None), (1 + 1e-4, "by 0.0001"), (np.nan, "by inf")]
)
def test_a_difference_beyond_rounding_is_found(tmp_path: Path, factor: float, found: str | None) -> None:
    for name, value in (("a", 1.0), ("b", factor)):
        onnx.save(scaled(value), tmp_path / f"{name}.onnx")
    reason = checks.difference(tmp_path / "a.onnx", tmp_path / "b.onnx", checks.allowed(scaled(1.0)))
    assert reason is None if found is None else found in (reason or "")


def test_outputs_of_integers_must_be_equal(tmp_path: Path) -> None:
    for name, value in (("a", 1e6), ("b", 1e6 + 10)):
        onnx.save(scaled(value, TensorProto.INT64), tmp_path / f"{name}.onnx")
    assert "output 'y' changes" in (checks.difference(tmp_path / "a.onnx", tmp_path / "b.onnx", 1e-2) or "")
    assert checks.difference(tmp_path / "a.onnx", tmp_path / "a.onnx", 0.0) is None


def test_an_interface_that_differs_is_found(tmp_path: Path) -> None:
    onnx.save(scaled(1.0), tmp_path / "a.onnx")
    onnx.save(scaled(1.0, TensorProto.DOUBLE), tmp_path / "b.onnx")
    assert "its type is tensor(float) in a" in (checks.difference(tmp_path / "a.onnx", tmp_path / "b.onnx", 1.0) or "")


def test_sixteen_bits_are_allowed_more() -> None:
    half = Net(opset=17, dtype=TensorProto.FLOAT16)
    model = half.model(half.gemm(half.input("x", ["n", 3]), 3, 5))
    assert checks.allowed(model) > 100 * checks.allowed(normalised())


# -- ort ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "lstm", "vit"])
def test_an_ort_file_computes_the_same(tmp_path: Path, name: str) -> None:
    source = MODELS / f"digits_{name}.onnx"
    path = spa.export(source, "ort", tmp_path / "m.ort")
    assert names(tmp_path) == ["m.ort"]
    assert path.read_bytes()[4:8] == b"ORTM"
    assert same(source, path, 1e-5)


def test_an_ort_file_holds_external_data(tmp_path: Path) -> None:
    source = external(tmp_path / "in")
    path = spa.export(source, "ort", tmp_path / "m.ort")
    shutil.rmtree(tmp_path / "in")
    assert names(tmp_path) == ["m.ort"]
    assert same(RESNET, path, 1e-5)


def test_an_ort_file_has_its_ending(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"ending \.ort"):
        spa.export(RESNET, "ort", tmp_path / "m.onnx")


def test_an_ort_file_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "allowed", lambda model: -1.0)
    with pytest.raises(UnsupportedError, match=r"differs from the model: output 'logits' changes"):
        spa.export(RESNET, "ort", tmp_path / "m.ort")
    assert names(tmp_path) == []


# -- openvino -------------------------------------------------------------------------------------------------------


def test_openvino_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'spa-onnx\[openvino\]'"):
        spa.export(RESNET, "openvino", tmp_path / "ov")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_openvino_computes_the_same(tmp_path: Path, name: str) -> None:
    ov = pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    source = MODELS / f"digits_{name}.onnx"
    path = spa.export(source, "openvino", tmp_path / "ov")
    assert names(tmp_path / "ov") == ["model.bin", "model.xml"]
    x = random_array(3, 1, 8, 8)
    found = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"input": x})["logits"]
    np.testing.assert_allclose(found, run(load_session(source), {"input": x})[0], rtol=1e-5, atol=1e-5)
    weights = sum(t.ByteSize() for t in onnx.load(source).graph.initializer)
    assert (tmp_path / "ov" / "model.bin").stat().st_size > 0.9 * weights  # not halved to sixteen bits


def test_openvino_reads_external_data(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    path = spa.export(external(tmp_path / "in"), "openvino", tmp_path / "ov")
    assert path.with_suffix(".bin").stat().st_size > 1_000_000


def test_an_operator_that_openvino_lacks_is_said(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    net = Net(opset=17)
    model = net.model(net.node("Det", net.input("x", ["n", 3, 3])))
    with pytest.raises(UnsupportedError, match=r"openvino cannot take the model: .*Det.*Export to onnx or ort"):
        spa.export(model, "openvino", tmp_path / "ov")


def test_an_openvino_model_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    monkeypatch.setattr(openvino, "allowed", lambda model: -1.0)
    with pytest.raises(UnsupportedError, match="differ from onnxruntime's by"):
        spa.export(RESNET, "openvino", tmp_path / "ov")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.0], [3.0, 4.5], 0.1),
        ([1.0, np.nan], [1.0, np.nan], 0.0),
        ([1.0, np.nan], [1.0, 2.0], np.inf),
        ([1.0, 2.0], [1.0, np.nan], np.inf),
        ([1.0, np.inf], [1.0, np.inf], 0.0),
        ([1.0, np.inf], [1.5, np.inf], 0.5),
        ([0.0], [1.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_the_distance_of_arrays(a: list[float], b: list[float], distance: float) -> None:
    assert checks._relative(np.array(a), np.array(b)) == pytest.approx(distance)


def test_what_fails_its_checks_is_called_by_its_name(tmp_path: Path) -> None:
    net = Net(opset=17)
    broken = net.model(net.node("Relu", net.input("x", ["n", 3])))
    broken.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(broken, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"^the model fails onnx.checker: .*NoSuchOperator"):
        checks.check(tmp_path / "m.onnx", None)
    with pytest.raises(ModelError, match=r"^the pruned model fails onnx.checker"):
        checks.check(tmp_path / "m.onnx", None, "the pruned model")


# -- the one door ---------------------------------------------------------------------------------------------------


def test_an_unknown_target_and_options_of_another_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot export to 'tflite'\. Choose one of onnx, ort, openvino, torch"):
        spa.export(RESNET, "tflite", tmp_path / "m")
    with pytest.raises(PlanError, match="the target ort takes no opset: that is for onnx"):
        spa.export(RESNET, "ort", tmp_path / "m.ort", opset=13)


def test_a_result_is_exported_as_its_pruned_model(tmp_path: Path) -> None:
    source = external(tmp_path / "in")
    result = spa.prune(source, criterion="l2", ratio=0.3)
    result.save(tmp_path / "saved.onnx")
    path = spa.export(result, "onnx", tmp_path / "exported.onnx")
    assert names(tmp_path) == ["exported.onnx", "exported.onnx.data", "in", "saved.onnx", "saved.onnx.data"]
    assert same(tmp_path / "saved.onnx", path, 0.0)
    assert same(path, spa.export(result, "ort", tmp_path / "m.ort"))
    with pytest.raises(PlanError, match=r"the output .* is the input"):
        spa.export(result, "onnx", source)


@pytest.mark.parametrize("target", ["onnx", "ort", "openvino"])
def test_a_folder_that_is_not_there_is_said(tmp_path: Path, target: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    with pytest.raises(SpaError, match="cannot write"):
        spa.export(RESNET, target, tmp_path / "none" / "m.ort")


def test_the_torch_target_gets_the_weights_of_a_model_with_external_data(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs  pip install 'spa-onnx[torch]'")
    path = external(tmp_path / "in")
    file = spa.export(path, "torch", tmp_path / "net")
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    [expected] = run(load_session(path), {"input": x})
    found = torch.export.load(file).module()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_functions_of_the_package_stay_functions_whatever_was_imported() -> None:
    code = "import spa, spa.exporters.checks, spa.widths.latency; print(spa.verify.__module__, callable(spa.verify), callable(spa.bench))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["spa.running.verify", "True", "True"]
