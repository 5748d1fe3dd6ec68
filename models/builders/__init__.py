"""A zoo of well-known architectures with random weights, small enough to run in milliseconds.

    from models.builders import ZOO, build
    model = build("resnet_basic")            # an onnx.ModelProto, the same on every call

Importing this package imports neither torch nor onnx; the torch builders do so when they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    import onnx

    from models.builders.export import Network

# Module -> its architectures, each a function of that module without arguments.
FAMILIES = {
    "convnets": (
        "plain_cnn vgg resnet_basic resnet_bottleneck resnet_padded_shortcut densenet inception googlenet"
        " squeezenet resnet_equal_constants"
    ),
    "mobile": "resnext mobilenet_v2 mobilenet_v3 efficientnet shufflenet_v2 regnet convnext",
    "dense_prediction": "unet fpn super_resolution yolo diffusion_unet",
    "vision_transformers": "vit vit_torchvision swin mlp_mixer",
    "language": "bert gpt2 llama t5",
    "audio": "whisper_encoder wavenet conv1d",
    "recurrent": "lstm gru bilstm",
    "structures": "conv3d siamese tied_embeddings multi_io",
    "handmade": (
        "handmade_residual handmade_residual_fp16 handmade_grouped handmade_group_norm handmade_rms_attention"
        " handmade_contrib handmade_qdq handmade_qlinear handmade_function handmade_if handmade_loop"
        " handmade_scan handmade_old"
    ),
}
# These exist a second time, as `NAME_dynamo`, written by PyTorch's newer exporter with its default options.
DYNAMO = "resnet_basic mobilenet_v2 convnext unet yolo diffusion_unet vit swin bert gpt2 llama whisper_encoder lstm"
# And these as `NAME_dynamo_raw`: without the exporter's own optimiser, the way `spa.importers.pytorch` does.
RAW = "resnet_basic vit llama"
# The TorchScript exporter with its default options, which fold BatchNorm and constants: `NAME_folded`.
FOLDED = "resnet_basic mobilenet_v3 vit lstm"


def _seed(name: str) -> int:
    return crc32(name.encode())


def network(name: str) -> Network:
    """Build the torch module of an architecture (no `handmade_` one), with inputs and random weights."""
    import torch

    from models.builders.export import randomise

    family = next(family for family, names in FAMILIES.items() if name in names.split())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(name))
        made = getattr(import_module(f"models.builders.{family}"), name)()
        if not made.keep_fresh:
            randomise(made)
    made.module.eval()
    return made


def _torchscript(name: str) -> onnx.ModelProto:
    from models.builders import export

    return export.torchscript(network(name))


def _folded(name: str) -> onnx.ModelProto:
    import torch

    from models.builders import export

    made = network(name)
    made.script = {"do_constant_folding": True, "training": torch.onnx.TrainingMode.EVAL}
    return export.torchscript(made)


def _dynamo(name: str, optimize: bool) -> onnx.ModelProto:
    from models.builders import export

    made = network(name)
    made.dynamo = {**made.dynamo, "optimize": optimize}
    return export.dynamo(made)


def _handmade(name: str) -> onnx.ModelProto:
    return getattr(import_module("models.builders.handmade"), name)()


def _zoo() -> dict[str, Callable[[], onnx.ModelProto]]:
    zoo: dict[str, Callable[[], onnx.ModelProto]] = {}
    for family, names in FAMILIES.items():
        maker = _handmade if family == "handmade" else _torchscript
        zoo |= {name: partial(maker, name) for name in names.split()}
    zoo |= {f"{name}_folded": partial(_folded, name) for name in FOLDED.split()}
    zoo |= {f"{name}_dynamo": partial(_dynamo, name, True) for name in DYNAMO.split()}
    zoo |= {f"{name}_dynamo_raw": partial(_dynamo, name, False) for name in RAW.split()}
    return zoo


ZOO = _zoo()


def build(name: str) -> onnx.ModelProto:
    """Build one model of the zoo.

    Args:
        name: a key of `ZOO`.

    Returns:
        The model; the same on every call.
    """
    return ZOO[name]()
