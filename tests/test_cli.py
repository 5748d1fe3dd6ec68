"""The command line from end to end: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spa.model.io import load

MODELS = Path(__file__).parent.parent / "models"
RESNET = MODELS / "digits_resnet.onnx"


def spa(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spa.cli", *map(str, arguments)]
    root = str(Path(__file__).parent.parent)
    env = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1", "PYTHONPATH": root}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One clear message on standard error, the documented exit code, no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(RESNET, tmp_path / "model.onnx"))


def test_prune_writes_a_smaller_model_and_leaves_the_input_as_it_was(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    result = spa("prune", model, "-o", tmp_path / "small.onnx", "--ratio", 0.3)
    assert result.returncode == 0, result.stderr
    assert "MACs" in result.stdout
    assert model.read_bytes() == before
    assert (tmp_path / "small.onnx").stat().st_size < 0.8 * len(before)
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "small.onnx"]


def test_the_same_command_writes_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        assert spa("prune", model, "-o", tmp_path / name, "--criterion", "random", "--seed", 3).returncode == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_plan_written_and_applied_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert (
        spa(
            "prune", model, "-o", tmp_path / "a.onnx", "--ratio", 0.4, "--plan-out", plan, "--criterion", "l2"
        ).returncode
        == 0
    )
    assert spa("prune", model, "-o", tmp_path / "b.onnx", "--plan", plan).returncode == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert json.loads(plan.read_text())["kept"]


def test_json_reports_what_was_asked_for_and_what_was_reached(model: Path, tmp_path: Path) -> None:
    result = spa(
        "prune", model, "-o", tmp_path / "small.onnx", "--ratio", 0.4, "--of", "params", "--criterion", "l2", "--json"
    )
    report = json.loads(result.stdout)
    assert report["requested"]["goal"]["ratio"] == 0.4
    assert report["requested"]["goal"]["of"] == "params"
    assert abs(report["reached"] - 0.4) <= 0.01
    stored = sum(int(np.prod(t.dims)) for t in onnx.load(tmp_path / "small.onnx").graph.initializer)
    assert report["after"]["params"] == stored


def test_a_config_file_holds_options_and_the_command_line_wins(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "spa.toml"
    config.write_text('[goal]\nratio = 0.4\nof = "params"\n[scoring]\ncriterion = "l1"\n', encoding="utf-8")
    command = ("prune", model, "-o", tmp_path / "small.onnx", "--config", config, "--json")
    requested = json.loads(spa(*command, "--criterion", "l2").stdout)["requested"]
    assert requested["goal"]["ratio"] == 0.4
    assert requested["scoring"]["criterion"] == "l2"
    direct = ("prune", model, "-o", tmp_path / "direct.onnx", "--ratio", 0.4, "--of", "params", "--criterion", "l2")
    assert spa(*direct).returncode == 0
    assert (tmp_path / "small.onnx").read_bytes() == (tmp_path / "direct.onnx").read_bytes()


def test_every_option_of_a_request_is_a_flag_with_its_help_and_no_default_of_its_own(
    model: Path, tmp_path: Path
) -> None:
    from spa.request import Request, options
    from spa.request.option import default_of, flag_of

    text = " ".join(spa("prune", "--help").stdout.replace("│", " ").split())
    for _, about in options():
        if about.metadata["kind"].on_file:
            assert flag_of(about) in text
            if default := default_of(about).replace("`", ""):
                assert f"Default: {default}." in text, about.name
    assert "One of: auto, full, quick, readers, bias, none." in text
    report = json.loads(spa("prune", model, "-o", tmp_path / "small.onnx", "--criterion", "l2", "--json").stdout)
    assert report["requested"] == Request.of(criterion="l2").to_dict()


def test_prove_compares_the_pruned_network_with_the_masked_original(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert spa("prune", model, "-o", tmp_path / "small.onnx", "--plan-out", plan).returncode == 0
    result = spa("prove", model, plan)
    assert result.returncode == 0, result.stderr
    assert "equal to the masked original" in result.stdout
    proof = json.loads(spa("prove", model, plan, "--json", "--seeds", 2).stdout)
    assert proof["holds"]
    assert proof["error"] < 1e-5 < 0.05 < proof["effect"]
    assert proof["seeds"] == [0, 1]
    refused(spa("prove", MODELS / "digits_vgg.onnx", plan), 3, "the plan names")


@pytest.mark.parametrize("option", ["--report", "--plan-out"])
def test_texts_never_replace_a_model_or_each_other(model: Path, tmp_path: Path, option: str) -> None:
    before = model.read_bytes()
    output, weights = tmp_path / "small.onnx", tmp_path / "model.onnx.data"
    weights.write_bytes(bytes(range(256)))
    circle = tmp_path / "circle"
    circle.symlink_to("circle")
    remedies = {
        model: (2, "is the model that is pruned. Choose another file"),
        output: (2, "is what --output writes. Choose another file"),
        output.with_name("small.onnx.data"): (2, "is where the weights of --output may go. Choose another file"),
        weights: (1, "is no JSON, HTML or figure. Choose another file"),
        tmp_path: (1, "is a folder. Name a file in it"),
        tmp_path / "none" / "x": (1, "its folder does not exist. Choose another place"),
        circle: (1, "it is a symbolic link to 'circle'. Name the file itself, or another"),
        circle / "x": (1, "its folder does not exist. Choose another place"),
    }
    for target, (code, words) in remedies.items():
        refused(spa("prune", model, "-o", output, "--criterion", "l2", option, target), code, option, words)
    refused(spa("prune", model, "-o", output, "--report", tmp_path / "x", "--plan-out", tmp_path / "x"), 2, "is what")
    assert model.read_bytes() == before
    assert weights.read_bytes() == bytes(range(256))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["circle", "model.onnx", "model.onnx.data"]
    for _ in range(2):  # a text of ours is written anew
        assert spa("prune", model, "-o", output, "--criterion", "l2", option, tmp_path / "text").returncode == 0


def test_what_nobody_foresaw_is_a_bug_with_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa.cli import commands

    def broken(standalone_mode: bool) -> None:
        raise KeyError("nobody foresaw")

    monkeypatch.setattr(commands, "app", broken)
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == 70


def test_a_folder_without_a_model_is_no_model(tmp_path: Path) -> None:
    refused(spa("inspect", tmp_path), 6, "it is a folder")


def test_the_html_report_names_both_files_and_every_group(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert spa("prune", model, "-o", tmp_path / "small.onnx", "--criterion", "l2", "--report", page).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert "small.onnx" in text
    assert "stem.conv.weight" in text or "conv" in text


def test_inspect_lists_groups_frozen_axes_and_reach() -> None:
    found = json.loads(spa("inspect", MODELS / "digits_vit.onnx", "--json").stdout)
    assert any(g["crossings"] for g in found["groups"])
    assert any("graph output 'logits'" in g["frozen"] for g in found["frozen"])
    assert 0 < found["reach"]["free"] < found["reach"]["with crossings"] < 1
    text = spa("inspect", MODELS / "digits_vit.onnx").stdout
    assert "graph output 'logits'" in text
    assert "--cross-norm" in text


def test_verify_says_how_far_apart_two_models_are(model: Path, tmp_path: Path) -> None:
    same = spa("verify", model, RESNET, "--atol", 1e-6)
    assert same.returncode == 0
    assert "same interface" in same.stdout
    assert spa("prune", model, "-o", tmp_path / "small.onnx", "--criterion", "l2").returncode == 0
    assert spa("verify", model, tmp_path / "small.onnx").returncode == 0
    assert spa("verify", model, tmp_path / "small.onnx", "--atol", 1e-6).returncode == 1
    assert spa("verify", model, MODELS / "digits_lstm.onnx", "--size", "batch=2").returncode in (0, 1)


def test_bench_prints_ratios_against_the_first(model: Path) -> None:
    found = json.loads(spa("bench", model, MODELS / "digits_lstm.onnx", "--seconds", 0.05, "--json").stdout)
    assert found["models"][0]["speedup"] == 1
    assert found["models"][1]["median_ms"] > 0


# -- bad input ------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    refused(spa("prune", tmp_path / "no.onnx", "-o", tmp_path / "o.onnx"), 6, "no.onnx", "No such file")
    refused(spa("verify", RESNET, tmp_path / "no.onnx"), 6, "no.onnx", "No such file")


@pytest.mark.parametrize("content", [b"", b"garbage \xff\xfe garbage", RESNET.read_bytes()[:5000]])
def test_garbage_and_truncated_files_are_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    refused(spa("prune", tmp_path / "bad.onnx", "-o", tmp_path / "o.onnx"), 4, "bad.onnx", "Export or copy it again")
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(0, "between 0 and 1"), (1, "between 0 and 1"), (-2, "between 0 and 1"), (1.5, "between"), (30, "between")],
)
def test_a_ratio_outside_its_range_is_refused(model: Path, tmp_path: Path, ratio: float, words: str) -> None:
    refused(spa("prune", model, "-o", tmp_path / "o.onnx", f"--ratio={ratio}"), 2, words)


def test_an_impossible_ratio_is_refused_with_what_is_reachable(model: Path, tmp_path: Path) -> None:
    refused(spa("prune", model, "-o", tmp_path / "o.onnx", "--ratio", 0.999), 3, "at most", "%")
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize("option", ["--of", "--ranking", "--criterion", "--norm", "--agg", "--reconstruct"])
def test_an_unknown_choice_is_refused_with_the_known_ones(model: Path, tmp_path: Path, option: str) -> None:
    refused(spa("prune", model, "-o", tmp_path / "o.onnx", option, "nonsense"), 2, "'nonsense'", "Choose one of")


def test_nothing_to_prune_is_said_and_nothing_written(model: Path, tmp_path: Path) -> None:
    refused(spa("prune", model, "-o", tmp_path / "o.onnx", "--ignore", "*"), 3, "the request ignores '*'")
    assert not (tmp_path / "o.onnx").exists()


def test_a_set_of_groups_that_matches_none_is_refused(model: Path, tmp_path: Path) -> None:
    refused(spa("prune", model, "-o", tmp_path / "o.onnx", "--equal", "none*"), 3, "equal: 'none*' matches none of")


def test_the_input_is_not_overwritten_without_force(model: Path) -> None:
    before = model.read_bytes()
    refused(spa("prune", model, "-o", model), 2, "is the input", "--force")
    assert model.read_bytes() == before
    assert spa("prune", model, "-o", model, "--criterion", "l2", "--force").returncode == 0
    assert len(model.read_bytes()) < len(before)


def test_an_output_folder_that_is_not_there_is_said(model: Path, tmp_path: Path) -> None:
    refused(spa("prune", model, "-o", tmp_path / "none" / "o.onnx"), 1, "cannot write")


def test_a_full_device_leaves_the_old_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import spa as package
    from spa.errors import SpaError

    target = tmp_path / "o.onnx"
    target.write_bytes(b"old")
    result = package.prune(model)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SpaError, match="No space left on device"):
        result.save(target)
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "o.onnx"]


def linear(domain_op: str = "Relu", opset: int = 17) -> ModelProto:
    domain, _, op = domain_op.rpartition("::")
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((7, 7)).astype(np.float32), n) for n in ("a", "b")]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node(op, ["h"], ["r"], name="odd", domain=domain),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 7]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize(("opset", "word"), [(6, "newer"), (99, "older")])
def test_an_opset_out_of_range_is_refused(tmp_path: Path, opset: int, word: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(linear(opset=opset).SerializeToString())
    refused(spa("prune", path, "-o", tmp_path / "o.onnx"), 5, f"opset {opset}", word)


def test_an_unknown_operator_is_a_barrier_in_the_report(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(linear("my.domain::Odd").SerializeToString())
    found = json.loads(spa("inspect", path, "--json").stdout)
    assert found["barriers"][0]["operator"] == "Odd 'odd'"
    assert "operator my.domain::Odd has no rule" in found["barriers"][0]["reason"]
    refused(spa("prune", path, "-o", tmp_path / "o.onnx"), 3, "my.domain::Odd")


def test_a_model_that_onnxruntime_cannot_load_is_said_with_its_reason(tmp_path: Path) -> None:
    model = linear()
    model.graph.node.append(helper.make_node("Odd", ["x"], ["z"], domain="my.domain"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 7]))
    model.opset_import.append(helper.make_opsetid("my.domain", 1))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    refused(spa("prune", path, "-o", tmp_path / "o.onnx", "--round-to", 1), 4, "onnxruntime cannot load", "my.domain")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("--ratio", "30"), 2, "OptionError"),
        (("--of", "maccs"), 2, "OptionError"),
        (("--ratio", "0.5", "--latency-ms", "2"), 2, "OptionError"),
        (("--no-such-option",), 2, "UsageError"),
        (("--threads", "many"), 2, "UsageError"),
        (("--size", "x"), 2, "UsageError"),
        (("--range", "0"), 2, "UsageError"),
        (("--range", "0:255", "--mean", "0.5"), 2, "OptionError"),
        (("--config", "none.toml"), 6, "UnreadableError"),
        (("--plan", "none.json"), 6, "UnreadableError"),
        (("--data", "none.npz"), 6, "UnreadableError"),
        (("--ignore", "*", "--criterion", "l2"), 3, "PlanError"),
        (("--report", "no/page.html"), 1, "SpaError"),
    ],
)
def test_a_failure_is_json_where_the_report_would_be(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, kind: str
) -> None:
    result = spa("prune", model, "-o", tmp_path / "o.onnx", *arguments, "--json", cwd=tmp_path)
    failure = json.loads(result.stdout)["error"]
    assert (result.returncode, failure["exit_code"], failure["kind"]) == (code, code, kind)
    assert failure["message"]
    assert result.stderr == ""
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_bug_is_json_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from spa.cli import failures

    def broken(standalone_mode: bool) -> None:
        raise KeyError("a\x1b[31m")

    monkeypatch.setattr(sys, "argv", ["spa", "prune", "--json"])
    assert failures.run(broken) == 70
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["kind"] == "KeyError"
    assert "Traceback" in said.err
    assert "\x1b" not in said.err


def test_names_command_no_terminal_and_are_no_markup(tmp_path: Path) -> None:
    odd = "\x1b]0;title\x07[red]a[/red]\u202e"
    network = linear(f"my.domain::Odd{odd}")
    for name in ("x", "h", "y"):
        for node in network.graph.node:
            for names in (node.input, node.output):
                names[:] = [odd + n if n == name else n for n in names]
        for value in (*network.graph.input, *network.graph.output):
            value.name = odd + name if value.name == name else value.name
    (tmp_path / "a[").mkdir()
    path, data = tmp_path / "[bold]m.onnx", tmp_path / "a[" / "red].npz"
    path.write_bytes(network.SerializeToString())
    np.savez(data, **{odd + "x": np.ones((64, 7), np.float32)})
    found = spa("inspect", path)
    assert found.returncode == 0, found.stderr
    wrong = spa("prune", path, "-o", tmp_path / "o.onnx", "--data", data)
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (3, False), wrong.stderr
    shutil.copy(RESNET, tmp_path / "a[" / "red].onnx")
    np.savez(data, np.random.default_rng(0).random((64, 1, 8, 8), dtype=np.float32))
    pruned = spa("prune", "a[/red].onnx", "-o", "a[/].onnx", "--data", "a[/red].npz", "--verbose", cwd=tmp_path)
    assert pruned.returncode == 0, pruned.stderr
    for result in (found, wrong, pruned):
        assert not {"\x1b", "\x07", "\u202e"} & set(result.stdout + result.stderr)
    assert "a[/red].npz" in pruned.stdout


# -- external data --------------------------------------------------------------------------------------------------


def external(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir()
    onnx.save(onnx.load(RESNET), path, save_as_external_data=True, location="m.data", size_threshold=1024)
    return path


def test_external_data_is_pruned_and_stays_external(tmp_path: Path) -> None:
    path = external(tmp_path)
    assert spa("prune", path, "-o", tmp_path / "o.onnx").returncode == 0
    assert spa("prune", RESNET, "-o", tmp_path / "embedded.onnx").returncode == 0
    assert (tmp_path / "o.onnx.data").stat().st_size > 10 * (tmp_path / "o.onnx").stat().st_size
    ours, theirs = onnx.load(tmp_path / "o.onnx"), onnx.load(tmp_path / "embedded.onnx")
    for a, b in zip(ours.graph.initializer, theirs.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))


def test_missing_and_truncated_external_data_are_said(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = path.parent / "m.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:1000])
    refused(spa("prune", path, "-o", tmp_path / "o.onnx"), 4, "m.data", "truncated")
    data.unlink()
    refused(spa("prune", path, "-o", tmp_path / "o.onnx"), 4, "m.data", "missing")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    path = external(tmp_path)
    (tmp_path / "secret.bin").write_bytes(bytes(10_000_000))
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    refused(spa("prune", path, "-o", tmp_path / "o.onnx"), 4, location, "outside the model's folder")


def test_external_data_behind_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path)
    shutil.move(path.parent / "m.data", tmp_path / "elsewhere.bin")
    (path.parent / "m.data").symlink_to(tmp_path / "elsewhere.bin")
    refused(spa("prune", path, "-o", tmp_path / "o.onnx"), 4, "outside the model's folder")


# -- doors ----------------------------------------------------------------------------------------------------------


def test_every_door_gives_the_same_plan() -> None:
    import onnx_graphsurgeon as gs

    import spa as package

    sources = [RESNET, str(RESNET), RESNET.read_bytes(), onnx.load(RESNET), gs.import_onnx(onnx.load(RESNET))]
    plans = [package.prune(s, ratio=0.3, criterion="l2").plan for s in sources]
    assert all(p.kept == plans[0].kept for p in plans)
    assert isinstance(package.prune(RESNET, ratio=0.3, criterion="l2").to_graphsurgeon(), gs.Graph)


def test_a_thing_that_is_no_model_is_refused_by_type() -> None:
    from spa.errors import ModelError

    with pytest.raises(ModelError, match="cannot read a int"):
        load(5)


def test_importing_spa_and_all_that_it_offers_imports_no_framework() -> None:
    code = (
        "import sys, time, spa; seconds = time.process_time(); print(seconds < 0.8)\n"
        "for name in spa.__all__: getattr(spa, name)\n"
        "heavy = 'torch tensorflow keras jax flax equinox openvino networkx threadpoolctl'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["True", "[]"]


def test_threads_of_openblas_are_told_to_rest_before_numpy_reads_it() -> None:
    code = (
        "import os, sys, spa.cli.commands\n"
        "print('numpy' in sys.modules)\n"
        "spa.cli.commands.app = lambda standalone_mode: print(os.environ['OPENBLAS_THREAD_TIMEOUT'])\n"
        "spa.cli.main()"
    )
    for given, found in (({}, "20"), ({"OPENBLAS_THREAD_TIMEOUT": "26"}, "26")):
        inherited = {k: v for k, v in os.environ.items() if k != "OPENBLAS_THREAD_TIMEOUT"}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=inherited | given
        )
        assert result.stdout.split() == ["False", found]


# -- export and convert ---------------------------------------------------------------------------------------------


def test_export_writes_for_the_target_and_says_where(model: Path, tmp_path: Path) -> None:
    result = spa("export", model, "--to", "onnx", "-o", tmp_path / "o.onnx", "--opset", 21, "--ir-version", 10)
    assert result.returncode == 0, result.stderr
    assert "o.onnx" in result.stdout
    written = onnx.load(tmp_path / "o.onnx")
    assert (written.opset_import[0].version, written.ir_version) == (21, 10)


def test_export_fixes_open_sizes(model: Path, tmp_path: Path) -> None:
    before = onnx.load(model).graph
    name = next(d.dim_param for d in before.input[0].type.tensor_type.shape.dim if d.dim_param)
    result = spa("export", model, "--to", "onnx", "-o", tmp_path / "o.onnx", "--size", f"{name}=3")
    assert result.returncode == 0, result.stderr
    ends = onnx.load(tmp_path / "o.onnx").graph
    for old, new in ((before.input[0], ends.input[0]), (before.output[0], ends.output[0])):
        sizes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in (old, new)]
        assert sizes[1] == [n or 3 for n in sizes[0]]
    wrong = spa("export", model, "--to", "onnx", "-o", tmp_path / "w.onnx", "--size", "width=3")
    refused(wrong, 2, "no open size 'width'", f"its open sizes are {name}")
    assert not (tmp_path / "w.onnx").exists()


def test_export_refuses_what_does_not_fit(model: Path, tmp_path: Path) -> None:
    refused(spa("export", model, "--to", "ort", "-o", tmp_path / "o.ort", "--optimise"), 2, "takes no optimise")
    refused(spa("export", model, "--to", "coreml", "-o", tmp_path / "o"), 2, "'coreml'", "Choose one of")
    refused(spa("export", model, "--to", "onnx", "-o", tmp_path / "o.onnx", "--opset", 13), 3, "Keep opset 17")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.fixture
def importer(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, dict[str, Any]]]:
    """A converter in the place of the frameworks', and the calls that it gets."""
    from spa import doors
    from spa.importers import Imported

    calls = []

    def convert(source: Any, example_inputs: Any = None, **options: Any) -> Imported:
        calls.append((source, example_inputs, options))
        return Imported(onnx.load(RESNET), "torch", "torch.export", {}, 2.5e-7, ("One note.", "Another."))

    monkeypatch.setattr(doors, "convert", convert)
    return calls


def convert(*arguments: object) -> Any:
    from typer.testing import CliRunner

    from spa.cli import app

    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_convert_without_options_passes_none(importer: list[Any], tmp_path: Path) -> None:
    result = convert("net.pt2", "-o", tmp_path / "o.onnx")
    assert result.exit_code == 0, result.output
    assert importer == [(Path("net.pt2"), None, {})]
    assert (tmp_path / "o.onnx").read_bytes() == onnx.load(RESNET).SerializeToString(deterministic=True)
    for words in ("by torch.export", "2.5e-07", "One note.\nAnother."):
        assert words in result.output


def test_convert_makes_inputs_of_the_shapes_in_order(importer: list[Any], tmp_path: Path) -> None:
    options = ["--input", "2,3,5", "--input", "4:int64", "--input", "7:bool", "--input", ":float64"]
    assert convert("net.pt", "-o", tmp_path / "o.onnx", *options).exit_code == 0
    [(_, arrays, _)] = importer
    assert [(a.shape, a.dtype.name) for a in arrays] == [
        ((2, 3, 5), "float32"),
        ((4,), "int64"),
        ((7,), "bool"),
        ((), "float64"),
    ]
    assert set(np.ravel(arrays[1])) <= {0, 1}
    assert len(np.unique(arrays[0])) == 30


def test_convert_makes_inputs_by_name_and_passes_what_was_given(
    importer: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zoo_of_this_test.py").write_text("def build(): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ["--input", "ids=1,128:int64", "--input", "x=1,3", "--factory", "zoo_of_this_test:build", "--trust"]
    result = convert("net.pt", "-o", "o.onnx", *options, "--signature", "serve", "--opset", 18)
    assert result.exit_code == 0, result.output
    [(_, arrays, given)] = importer
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
        "ids": ((1, 128), "int64"),
        "x": ((1, 3), "float32"),
    }
    assert given.pop("factory").__name__ == "build"
    assert given == {"trust": True, "signature": "serve", "opset": 18}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--input", "1,x"], "is no shape such as"),
        (["--input", "1,0"], "is no shape such as"),
        (["--input", "1:complex64"], "is no shape such as"),
        (["--input", "1:floot"], "is no shape such as"),
        (["--input", "a=1", "--input", "2"], "all inputs have names"),
        (["--input", "a=1", "--input", "a=2"], "given twice"),
        (["--factory", "json"], "no module:callable"),
        (["--factory", "no_such_module:f"], "No module named"),
        (["--factory", "json:nothing"], "nothing"),
        (["--factory", "json:__name__"], "it is a str"),
    ],
)
def test_convert_refuses_malformed_options(
    importer: list[Any], tmp_path: Path, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "200")
    result = convert("net.pt", "-o", tmp_path / "o.onnx", *options)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
    assert importer == []


def test_convert_says_when_no_framework_is_recognised(tmp_path: Path) -> None:
    refused(spa("convert", "net.xyz", "-o", tmp_path / "o.onnx"), 4, "which framework", "net.xyz")
