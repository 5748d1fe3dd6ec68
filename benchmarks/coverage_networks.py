"""The PyTorch networks of coverage_frameworks.py: which they are, with random weights that matter, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import common
import models16

if TYPE_CHECKING:
    from torch import nn

NOISE = 1e-4

# All of torchvision's classifiers, by size.
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
convnext_large vit_l_16 vit_l_32 vit_h_14 regnet_y_128gf
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

# Text and sound through the TorchScript exporter; it gets all networks for images, too.
TORCHSCRIPT = "BertModel GPT2LMHeadModel LlamaForCausalLM T5EncoderModel Wav2Vec2Model"

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
    """List all networks, as LIBRARY/NAME, or torchscript/LIBRARY/NAME."""
    exported = {"torchvision": TORCHVISION.split(), "timm": TIMM.split()}
    lists = exported | {"transformers": list(TRANSFORMERS)}
    traced = {f"torchscript/{library}": found for library, found in exported.items()}
    lists |= traced | {"torchscript/transformers": TORCHSCRIPT.split()}
    return [f"{library}/{name}" for library, found in lists.items() for name in found]


# -- build -----------------------------------------------------------------------------------------------


def build(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any] | None]:
    """Build a network with weights that matter, example inputs by argument, and axes to open (None: the batch)."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(common.THREADS)
    torchvision = models16.torchvision_models()  # the two other libraries need it to load, too
    library, _, kind = name.partition("/")
    shapes = None
    if library == "torchvision":
        module = models16.build(kind)
        inputs = {_argument(module): models16.images(kind, batch=2)}
        assert torchvision
    elif library == "timm":
        import timm

        module = timm.create_model(kind, pretrained=False)
        inputs = {_argument(module): torch.randn(2, *module.default_cfg["input_size"])}
    else:
        module, inputs, shapes = _transformer(kind)
    generator = torch.Generator().manual_seed(0)
    _perturb(module.eval(), generator)
    _settle(module, inputs, generator)
    return module, inputs, shapes


def _argument(module: nn.Module) -> str:
    import inspect

    return next(iter(inspect.signature(module.forward).parameters))


def _perturb(module: nn.Module, generator: Any) -> None:
    """Draw weights that matter: biases, scales, layer scales; running statistics that are not 0 and 1."""
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


def _settle(module: nn.Module, inputs: dict[str, Any], generator: Any) -> None:
    """Halve the scales of normalisations until noise does not grow on its way: else outputs show rounding alone."""
    import torch
    from torch import nn

    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    scales = [m.weight for m in module.modules() if isinstance(m, kinds) and m.weight is not None]
    images = {key: x for key, x in inputs.items() if x.is_floating_point()}
    noisy = {key: x + NOISE * torch.randn(x.shape, generator=generator) for key, x in images.items()}
    with torch.no_grad():
        for _ in range(4 if scales and images else 0):
            calm, moved = _first(module(**inputs)), _first(module(**inputs | noisy))
            if (calm - moved).abs().max() <= NOISE * calm.abs().max():
                break
            for scale in scales:
                scale.mul_(0.5)


def _first(outputs: Any) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_leaves(outputs)[0]


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
