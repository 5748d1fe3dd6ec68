"""Which PyTorch networks are imported, pruned and exact: torchvision, timm, transformers.

    python benchmarks/coverage_frameworks.py [--only timm resnet50 ...] [--again] [--seconds 600]

Each network has random weights that matter, and a process of its own with a time and a memory limit. It is imported
(`importers/pytorch.py`), 30 % of its MACs are removed by `spa.prune(criterion="l2")`, and what is left is compared in
onnxruntime with the original network whose removed channels are masked. Results are kept in results/, so the script can
be stopped and goes on where it was; it writes docs/coverage.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import models16

if TYPE_CHECKING:
    from torch import nn

NAME = "coverage_frameworks"
RATIO = 0.3
LIMITS: dict[str, Any] = {"timeout": 900, "memory": 14 * common.GIB, "cores": common.THREADS}
PAGE = common.ROOT / "docs" / "coverage.md"

# All of torchvision's classifiers but those above 150 million parameters, by size.
TORCHVISION = """
squeezenet1_1 squeezenet1_0 shufflenet_v2_x0_5 mnasnet0_5 shufflenet_v2_x1_0 mobilenet_v3_small mnasnet0_75
shufflenet_v2_x1_5 mobilenet_v2 regnet_y_400mf mnasnet1_0 efficientnet_b0 mobilenet_v3_large regnet_x_400mf mnasnet1_3
regnet_y_800mf regnet_x_800mf shufflenet_v2_x2_0 efficientnet_b1 densenet121 efficientnet_b2 regnet_x_1_6gf
regnet_y_1_6gf resnet18 efficientnet_b3 googlenet densenet169 regnet_x_3_2gf regnet_y_3_2gf efficientnet_b4
densenet201 efficientnet_v2_s resnet34 resnext50_32x4d resnet50 inception_v3 swin_t swin_v2_t convnext_tiny
densenet161 efficientnet_b5 maxvit_t regnet_x_8gf regnet_y_8gf efficientnet_b6 resnet101 swin_s swin_v2_s
convnext_small regnet_x_16gf efficientnet_v2_m resnet152 alexnet efficientnet_b7 wide_resnet50_2 regnet_y_16gf
resnext101_64x4d vit_b_16 swin_b swin_v2_b vit_b_32 convnext_base resnext101_32x8d regnet_x_32gf efficientnet_v2_l
wide_resnet101_2 vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn regnet_y_32gf
"""

# A small network of each family.
TIMM = """
resnet18d resnetv2_18 seresnet18 legacy_seresnet18 ecaresnet26t skresnet18 res2net50_26w_4s resnest14d selecsls42b
tresnet_m vovnet39a ese_vovnet19b_dw dla34 dpn68 hrnet_w18_small cs3darknet_s cspnext_tiny regnetx_002 regnety_002
rexnet_100 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium efficientnet_b0 tf_efficientnetv2_b0
mixnet_s hardcorenas_a ghostnet_050 ghostnetv2_100 repghostnet_050 repvit_m0_9 repvgg_a0 mobileone_s0 gernet_s
starnet_s1 fasternet_t0 hgnetv2_b0 lcnet_035 inception_v4 inception_next_atto legacy_xception xception41 convnext_atto
convnextv2_atto convmixer_768_32 rdnet_tiny nf_resnet26 nf_regnet_b0 dm_nfnet_f0 mambaout_femto poolformer_s12
caformer_s18 convformer_s18 botnet26t_256 halonet26t lambda_resnet26t vit_tiny_patch16_224 deit_tiny_patch16_224
deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 vit_relpos_small_patch16_224
vit_tiny_r_s16_p8_224 cait_xxs24_224 convit_tiny coat_tiny coat_lite_tiny crossvit_tiny_240 davit_tiny
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 fastvit_t8 focalnet_tiny_srf
gcvit_xxtiny hiera_tiny_224 levit_128s mixer_s16_224 gmlp_ti16_224 resmlp_12_224 mobilevit_xxs mobilevitv2_050
coatnet_nano_rw_224 maxvit_nano_rw_256 mvitv2_tiny nest_tiny nextvit_small pit_ti_224 pvt_v2_b0 sequencer2d_s shvit_s1
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tiny_vit_5m_224 tnt_s_patch16_224
twins_pcpvt_small twins_svt_small visformer_tiny vitamin_small_224 volo_d1_224 xcit_nano_12_p16_224
"""

_TEXT: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"intermediate_size": 80, "max_position_embeddings": 64}
_IMAGE: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
_IMAGE |= {"image_size": 32, "patch_size": 8}
_STAGES: dict[str, Any] = {"hidden_sizes": [16, 24, 32, 48]}
_DECODER = _TEXT | {"use_cache": False, "num_key_value_heads": 2}
_T5: dict[str, Any] = {"vocab_size": 97, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4}
_BART: dict[str, Any] = {"vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "use_cache": False}
_BART |= {
    f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("attention_heads", 4), ("ffn_dim", 80))
}
_GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "use_cache": False,
}

# By model class of transformers: its configuration's options and the kind of its inputs.
TRANSFORMERS: dict[str, tuple[dict[str, Any], str]] = {
    "BertModel": (_TEXT, "text"),
    "RobertaModel": (_TEXT, "text"),
    "DistilBertModel": ({"vocab_size": 97, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80}, "text"),
    "AlbertModel": (_TEXT | {"embedding_size": 24}, "text"),
    "ElectraModel": (_TEXT | {"embedding_size": 24}, "text"),
    "MPNetModel": (_TEXT, "text"),
    "DebertaV2Model": (_TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "text"),
    "MobileBertModel": (_TEXT | {"embedding_size": 24, "intra_bottleneck_size": 32, "true_hidden_size": 32}, "text"),
    "FNetModel": (_TEXT, "tokens"),
    "XLNetModel": ({"vocab_size": 97, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 80}, "text"),
    "GPT2LMHeadModel": (_GPT2, "text"),
    "GPTNeoXForCausalLM": (_TEXT | {"use_cache": False}, "text"),
    "OPTForCausalLM": (_TEXT | {"ffn_dim": 80, "word_embed_proj_dim": 48, "use_cache": False}, "text"),
    "BloomForCausalLM": ({"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 4, "use_cache": False}, "text"),
    "LlamaForCausalLM": (_DECODER, "text"),
    "MistralForCausalLM": (_DECODER, "text"),
    "Qwen2ForCausalLM": (_DECODER, "text"),
    "Qwen3ForCausalLM": (_DECODER | {"head_dim": 12}, "text"),
    "GemmaForCausalLM": (_DECODER | {"head_dim": 12}, "text"),
    "PhiForCausalLM": (_DECODER, "text"),
    "MixtralForCausalLM": (_DECODER | {"num_local_experts": 4}, "text"),
    "MambaForCausalLM": ({"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "use_cache": False}, "tokens"),
    "T5EncoderModel": (_T5, "text"),
    "T5ForConditionalGeneration": (_T5 | {"use_cache": False}, "pairs"),
    "BartModel": (_BART, "pairs"),
    "ViTForImageClassification": (_IMAGE, "images"),
    "DeiTForImageClassification": (_IMAGE, "images"),
    "BeitForImageClassification": (_IMAGE | {"use_relative_position_bias": True}, "images"),
    "Dinov2ForImageClassification": (_IMAGE, "images"),
    "SwinForImageClassification": (
        {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        "images",
    ),
    "ConvNextForImageClassification": (_STAGES | {"depths": [1, 1, 2, 1]}, "images"),
    "ResNetForImageClassification": (_STAGES | {"embedding_size": 16, "depths": [1] * 4}, "images"),
    "SegformerForSemanticSegmentation": (
        _STAGES | {"num_attention_heads": [1, 2, 4, 4], "depths": [1] * 4, "decoder_hidden_size": 32},
        "images",
    ),
    "MobileViTForImageClassification": (
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
        "images64",
    ),
    "CLIPVisionModel": (_IMAGE, "images"),
    "CLIPTextModel": (_TEXT, "text"),
    "WhisperEncoder": (
        {key: _BART[key] for key in _BART if not key.startswith(("decoder", "use"))} | {"max_source_positions": 30},
        "mel",
    ),
    "Wav2Vec2Model": (_TEXT | {"conv_dim": [16] * 3, "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 2]}, "sound"),
}  # fmt: skip


def names() -> list[str]:
    """All networks, as LIBRARY/NAME."""
    lists = {"torchvision": TORCHVISION.split(), "timm": TIMM.split(), "transformers": TRANSFORMERS}
    return [f"{library}/{name}" for library, found in lists.items() for name in found]


# -- build -----------------------------------------------------------------------------------------------


def build(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any] | None]:
    """A network with weights that matter, example inputs by argument, and axes to open (None: the batch)."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(common.THREADS)
    torchvision = models16.torchvision_models()  # the two other libraries need it to load, too
    library, _, kind = name.partition("/")
    shapes = None
    if library == "torchvision":
        module = models16.build(kind)
        inputs = {"input" if kind == "vgg" else _argument(module): models16.images(kind, batch=2)}
        assert torchvision
    elif library == "timm":
        import timm

        module = timm.create_model(kind, pretrained=False)
        inputs = {_argument(module): torch.randn(2, *module.default_cfg["input_size"])}
    else:
        module, inputs, shapes = _transformer(kind)
    _perturb(module.eval(), torch.Generator().manual_seed(0))
    return module, inputs, shapes


def _argument(module: nn.Module) -> str:
    import inspect

    return next(iter(inspect.signature(module.forward).parameters))


def _perturb(module: nn.Module, generator: Any) -> None:
    """Random weights that matter: biases, scales, layer scales; running statistics that are not 0 and 1."""
    import torch

    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if parameter.dim() and parameter.numel():
                models16.redraw(key, parameter, generator)
        for key, buffer in module.named_buffers():
            if key.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif key.endswith("running_var"):
                buffer.mul_(0.8 + 0.4 * torch.rand(buffer.shape, generator=generator))


def _transformer(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any] | None]:
    import torch
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    options, kind = TRANSFORMERS[name]
    cls = WhisperEncoder if name == "WhisperEncoder" else getattr(transformers, name)
    module = cls(cls.config_class(**options))
    if "num_local_experts" in options:
        module.set_experts_implementation("batched_mm")  # there is no ONNX for the default, grouped_mm
    tokens = torch.randint(3, 90, (2, 11))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    dims = {0: "batch", 1: "sequence"}
    makers: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Any] | None]]] = {
        "text": lambda: ({"input_ids": tokens, "attention_mask": mask}, {"input_ids": dims, "attention_mask": dims}),
        "tokens": lambda: ({"input_ids": tokens}, {"input_ids": dims}),
        "pairs": lambda: ({"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens[:, :7]}, None),
        "images": lambda: ({"pixel_values": torch.randn(2, 3, 32, 32)}, None),
        "images64": lambda: ({"pixel_values": torch.randn(2, 3, 64, 64)}, None),
        "mel": lambda: ({"input_features": torch.randn(2, 80, 60)}, None),
        "sound": lambda: ({"input_values": torch.randn(2, 4000)}, None),
    }
    return module, *makers[kind]()


# -- measure ---------------------------------------------------------------------------------------------


def measure(name: str) -> dict[str, Any]:
    """Import, prune and compare one network; what is known so far comes with the reason of a failure."""
    from spa import prune
    from spa.errors import SpaError
    from spa.importers.pytorch import convert

    facts: dict[str, Any] = {"stage": "build"}
    try:
        module, inputs, shapes = build(name)
        facts |= {"parameters": sum(p.numel() for p in module.parameters()), "stage": "import"}
        start = time.perf_counter()
        try:
            imported = convert(module, inputs, dynamic_shapes=shapes)
        except SpaError as error:
            if shapes is None:
                raise
            facts["sequence"] = f"closed: {error}"
            imported = convert(module, inputs)
        facts |= {"import s": round(time.perf_counter() - start, 1), "how": imported.how, "notes": imported.notes}
        facts |= {
            "import error": imported.error,
            "axes": _open(imported.model),
            "nodes": len(imported.model.graph.node),
        }
        facts |= _found(module, imported) | {"stage": "prune"}
        del module
        start = time.perf_counter()
        result = prune(imported.model, criterion="l2", ratio=RATIO)
        facts |= {
            "prune s": round(time.perf_counter() - start, 1),
            "removed": result.report.reached,
            "stage": "compare",
        }
        facts |= _equation(result)
    except Exception as error:
        return facts | {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    return facts | {"stage": "done"}


def _open(model: Any) -> str:
    dims = (d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim)
    return ", ".join(dict.fromkeys(d for d in dims if d))


def _found(module: nn.Module, imported: Any) -> dict[str, Any]:
    """How many parameters are initializers under their own names and with their own values."""
    keys = dict(module.named_parameters(remove_duplicate=False)).keys()
    found = set(imported.names.values()) | imported.aliases.keys()
    return {"keys": len(keys), "found": len(keys & found), "lost": sorted(keys - found)[:5]}


def _equation(result: Any) -> dict[str, float]:
    """How far the pruned network is from the masked original, and that from the original, over its magnitude."""
    import numpy as np

    from spa.feeds import working_feeds
    from spa.masking import masked
    from spa.runtime import load_session, run

    session = load_session(result.model)
    feeds = working_feeds(session, batch=3)
    got = run(session, feeds)
    del session
    expected = run(load_session(masked(result.analysis, result.plan)), feeds)
    dense = run(load_session(result.source.model), feeds)

    def apart(a: list[Any], b: list[Any]) -> float:
        return max(float(np.abs(x - y).max() / (np.abs(y).max() or 1)) for x, y in zip(a, b, strict=True) if y.size)

    return {"error": apart(got, expected), "moved": apart(expected, dense)}


# -- tell ------------------------------------------------------------------------------------------------


def row(name: str, facts: dict[str, Any]) -> list[str]:
    """A line of the table."""
    keys = f"{facts['found']} of {facts['keys']}" if "found" in facts else ""
    how = "TorchScript" if "dynamo=False" in facts.get("how", "") else "torch.export" if "how" in facts else ""
    forms = {"import error": ".0e", "import s": ".0f", "prune s": ".0f", "removed": ".0%", "error": ".0e"}
    numbers = [f"{facts[key]:{form}}" if key in facts else "" for key, form in forms.items()]
    size = f"{facts['parameters'] / 1e6:.1f}" if "parameters" in facts else ""
    return [
        name.partition("/")[2],
        size,
        how,
        facts.get("axes", "") or ("none" if how else ""),
        keys,
        *numbers,
        verdict(facts),
    ]


def verdict(facts: dict[str, Any]) -> str:
    """Yes where everything went well, else what did not."""
    if facts["stage"] != "done":
        return f"no: {facts['stage']}"
    return "yes" if facts["error"] < 1e-3 else "no: differs"


def page(cells: dict[str, dict[str, Any]], info: dict[str, Any]) -> str:
    """docs/coverage.md."""
    header = ["network", "M parameters", "exporter", "open axes", "names", "import error", "import s", "prune s"]
    header += ["MACs removed", "prune error", "ok"]
    text = [
        "# Coverage: PyTorch networks",
        "Made by `benchmarks/coverage_frameworks.py`. Each network, with random weights, is imported, "
        f'{RATIO:.0%} of its MACs are removed by `spa.prune(criterion="l2")`, and the result is run.',
        "- *names*: parameters that are initializers under their state_dict names, with their own values.\n"
        "- *import error*: the largest difference between the network in onnxruntime and in PyTorch, over the output's "
        "largest value, at several sizes of the open axes.\n"
        "- *prune error*: the same between the pruned network and the original whose removed channels are masked.",
        "Seconds were taken beside other work on the machine.",
        common.describe(info),
    ]
    for library in dict.fromkeys(name.partition("/")[0] for name in names()):
        mine = {name: cells[name] for name in names() if name.startswith(library + "/") and name in cells}
        if not mine:
            continue
        counts = Counter(verdict(facts) for facts in mine.values())
        said = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        wanted = sum(name.startswith(library + "/") for name in names())
        text += [f"## {library}", f"{len(mine)} of {wanted} networks tried: {said}."]
        text += [common.table(header, (row(name, facts) for name, facts in mine.items()))]
    reasons = [f"- `{name}`, {verdict(f)[4:]}: {_said(f)}" for name, f in cells.items() if verdict(f) != "yes"]
    closed = [f"- `{name}`: {_note(f)}" for name, f in cells.items() if f.get("notes") or f.get("sequence")]
    lost = [f"- `{name}`: {', '.join(f['lost'])}" for name, f in cells.items() if f.get("lost")]
    for title, lines in (
        ("What failed, and why", reasons),
        ("What importers noted", closed),
        ("Parameters that ONNX lacks (forward does not read them)", lost),
    ):
        if lines:
            text += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(text) + "\n"


def _said(facts: dict[str, Any]) -> str:
    if "reason" in facts:
        return re.sub(r"\s+", " ", facts["reason"])
    return f"pruned and masked outputs differ by {facts['error']:.1e}"


def _note(facts: dict[str, Any]) -> str:
    return " ".join([*facts.get("notes", ()), *([f"sequence {facts['sequence']}"] if "sequence" in facts else [])])


def _machine() -> dict[str, Any]:
    """The machine, with the versions of what the networks come from."""
    info = common.machine()
    info["versions"] |= {name: importlib.metadata.version(name) for name in ("onnxscript", "timm", "transformers")}
    return info


def _write(data: dict[str, Any], results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    for target, text in (
        (results / f"{NAME}.json", json.dumps(data, indent=1) + "\n"),
        (PAGE, page(data["cells"], data["machine"])),
    ):
        partial = target.with_name(target.name + ".partial")
        partial.write_text(text)
        partial.replace(target)


def main() -> None:
    """Measure what is missing, and write the page after each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", help="measure this network in this process and hand the figures to the parent")
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="such as 'timm/*' or 'timm/vit*'")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no network after this time")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    if options.one:
        common.answer(measure(options.one))
        return
    start = time.perf_counter()
    data = common.previous(NAME, options.results) or {"machine": _machine(), "cells": {}}
    for name in names():
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in options.only)
        if not wanted or (name in data["cells"] and not options.again):
            continue
        if time.perf_counter() - start > options.seconds:
            break
        child = common.python("coverage_frameworks.py", "--one", name, **LIMITS)
        facts = child.data or {"stage": "process", "reason": f"{child.status}: {child.reason}"}
        data["cells"][name] = facts | {"peak MB": child.peak_mb, "process s": child.seconds}
        print(
            name, verdict(facts), facts.get("reason", ""), f"{child.seconds:.0f} s, {child.peak_mb:.0f} MB", flush=True
        )
        _write(data, options.results)
    _write(data, options.results)


if __name__ == "__main__":
    main()
