"""Networks that nothing in this project was written for: builders of random ones, as small as their code allows.

timm's are what it lists; those of transformers are made from configurations whose known sizes are made small, with
inputs that their own forward code takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from coverage_networks import TIMM, TORCHVISION, TRANSFORMERS, _argument, _perturb, _settle

if TYPE_CHECKING:
    from torch import nn

LARGEST = 60_000_000  # parameters
SIZES = ("atto", "femto", "pico", "nano", "xxs", "xxt", "xs", "tiny", "_s", "small", "18", "_t", "_0", "26", "34", "50")

# Sizes of a configuration, by what transformers calls them.
SMALL: dict[str, Any] = dict.fromkeys(
    """hidden_size d_model n_embd embed_dim dim projection_dim encoder_hidden_size decoder_hidden_size n_embed
    fusion_hidden_size cross_attention_hidden_size""".split(),
    48,
)
SMALL |= dict.fromkeys(
    """num_hidden_layers n_layer n_layers encoder_layers decoder_layers num_layers num_decoder_layers
    num_encoder_layers depth""".split(),
    2,
)
SMALL |= dict.fromkeys(
    """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
    encoder_num_attention_heads decoder_num_attention_heads""".split(),
    4,
)
SMALL |= dict.fromkeys(
    """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner hidden_dim ffn_hidden_size d_ff
    moe_intermediate_size shared_expert_intermediate_size mlp_dim d_inner""".split(),
    80,
)
SMALL |= dict.fromkeys(["vocab_size", "vocab_size_or_config_json_file", "n_vocab"], 97)
SMALL |= {"num_key_value_heads": 2, "head_dim": 12, "d_kv": 12, "max_position_embeddings": 64, "n_positions": 64}
SMALL |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
SMALL |= {"n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8}
SMALL |= {"qk_nope_head_dim": 12, "v_head_dim": 12, "image_size": 64, "embedding_size": 24, "use_cache": False}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_source_positions": 30, "state_size": 8}
SMALL |= {"max_target_positions": 64, "hidden_dropout": 0.0, "decoder_start_token_id": 1, "num_queries": 10}
VARIANTS: tuple[dict[str, Any] | None, ...] = (  # what is changed of them, from the smallest on; None leaves them out
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None, "image_size": None},
    {"head_dim": None, "hidden_size": 64, "num_key_value_heads": 4},
    None,
)
FEW = ("vocab_size", "num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "use_cache", "image_size")


def names() -> list[str]:
    """List all networks, as LIBRARY/NAME; timm's go through the TorchScript exporter, which is quicker."""
    timm, transformers = list(timm_names()), list(transformers_names())
    return [f"torchscript/timm/{n}" for n in timm] + [f"transformers/{n}" for n in transformers]


def timm_names() -> Iterator[str]:
    """Yield networks of each file of timm that were never tried, those first whose names say that they are small."""
    import timm

    seen = {*TIMM.split(), *TORCHVISION.split()}
    for file in timm.list_modules():
        found = [n for n in timm.list_models(module=file) if n not in seen and not n.startswith(("test_", "naflex"))]
        yield from sorted(found, key=lambda n: (next((i for i, w in enumerate(SIZES) if w in n), len(SIZES)), n))[:2]


def transformers_names() -> Iterator[str]:
    """Yield the base class of each architecture that was never tried."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found: dict[str, None] = {}
    for value in MODEL_MAPPING_NAMES.values():
        found.update(dict.fromkeys([value] if isinstance(value, str) else value))
    yield from (name for name in found if name not in TRANSFORMERS and "Timm" not in name)


# -- build -----------------------------------------------------------------------------------------------


def build(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any] | None]:
    """Build a network with weights that matter, inputs by argument, and axes to open (None: the batch)."""
    import torch

    torch.manual_seed(0)
    library, _, kind = name.partition("/")
    if library == "timm":
        import timm

        with torch.device("meta"):
            count = sum(p.numel() for p in timm.create_model(kind).parameters())
        if count > LARGEST:
            raise NotImplementedError(f"{count / 1e6:.0f} M parameters are too many")
        module = timm.create_model(kind, pretrained=False).eval()
        inputs = {_argument(module): torch.randn(2, *module.default_cfg["input_size"])}
    else:
        module, inputs = _transformer(kind)
    generator = torch.Generator().manual_seed(0)
    _perturb(module, generator)
    _settle(module, inputs, generator)
    return module, inputs, _axes(inputs)


def _axes(inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Open batch and length of token inputs, where nothing else is given."""
    if not inputs.keys() <= {"input_ids", "attention_mask"}:
        return None
    return {key: {0: "batch", 1: "sequence"} for key in inputs}


def _transformer(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    cls = getattr(transformers, name)
    reasons = []
    for variant in VARIANTS:
        try:
            config = _config(cls.config_class, variant)
            module = _made(cls, config)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error).strip()[:120]}")
            continue
        for inputs in _inputs(module):
            try:
                module(**inputs)
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {str(error).strip()[:120]}")
                continue
            return module, inputs
    raise NotImplementedError(" | ".join(dict.fromkeys(reasons)))


def _made(cls: Any, config: Any) -> nn.Module:
    import torch

    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > LARGEST:
        raise NotImplementedError(f"{count / 1e6:.0f} M parameters are too many")
    torch.manual_seed(0)
    module = cls(config).eval()
    if hasattr(module, "set_experts_implementation"):
        with suppress(Exception):
            module.set_experts_implementation("batched_mm")  # there is no ONNX for the default, grouped_mm
    return module


def _config(cls: Any, variant: dict[str, Any] | None) -> Any:
    """Return a configuration whose known sizes are small."""
    base = cls()
    small = {k: SMALL[k] for k in FEW} if variant is None else {**SMALL, **variant}
    small = {k: v for k, v in small.items() if v is not None}
    own = {**getattr(cls, "attribute_map", {})}
    options = {k: v for k, v in small.items() if k in vars(base) and k not in own}
    for name in getattr(cls, "sub_configs", {}):
        sub = getattr(base, name, None)
        if sub is not None and hasattr(sub, "to_dict"):
            options[name] = _config(type(sub), variant).to_dict()
    return cls(**options)


def _inputs(module: Any) -> Iterator[dict[str, Any]]:
    import torch

    config = module.config
    takes = inspect.signature(module.forward).parameters
    main = module.main_input_name
    tokens = torch.randint(3, 90, (2, 11))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    if main == "input_ids" or "input_ids" in takes:
        inputs: dict[str, Any] = {"input_ids": tokens}
        if "attention_mask" in takes:
            inputs["attention_mask"] = mask
        if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = tokens[:, :7]
        yield inputs
        yield {"input_ids": tokens}
        if "bbox" in takes:
            yield {**inputs, "bbox": torch.randint(0, 10, (2, 11, 4))}
        if "pixel_values" in takes:
            for side in _sides(config):
                yield {**inputs, "pixel_values": torch.randn(2, 3, side, side)}
    if main == "pixel_values" or "pixel_values" in takes:
        for side in _sides(config):
            for channels in dict.fromkeys((getattr(config, "num_channels", 3), 3)):
                yield {"pixel_values": torch.randn(2, channels, side, side)}
    if "input_features" in takes:
        for bins in (getattr(config, "num_mel_bins", 80), 80, 128, 160):
            for shape in ((2, bins, 60), (2, 60, bins), (2, bins, 120)):
                yield {"input_features": torch.randn(*shape)}
    if "input_values" in takes:
        for shape in ((2, 4000), (2, 1, 4000), (2, 1024, 128)):
            yield {"input_values": torch.randn(*shape)}
    if "past_values" in takes:
        length = getattr(config, "context_length", 32)
        channels = getattr(config, "num_input_channels", 1)
        yield {"past_values": torch.randn(2, length, channels)}
    if "spectrogram" in takes:
        yield {"spectrogram": torch.randn(2, 30, 80)}


def _sides(config: Any) -> Iterator[int]:
    for each in (config, getattr(config, "vision_config", None)):
        side = getattr(each, "image_size", None)
        if isinstance(side, int) and side <= 384:
            yield side
    yield from (64, 224)
