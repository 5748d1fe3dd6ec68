"""Small networks in flax (nnx, linen), equinox and plain JAX, of the same three architectures."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# One thread, and quick compilation; XLA reads this once, when JAX makes its first array.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 --xla_backend_optimization_level=0",
)

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spa.importers import Imported
from spa.importers.jax import convert

CLASSES, SIDE, CHANNELS = 10, 8, 3  # images of SIDE x SIDE
TOKENS, WORDS, WIDTH, HEADS = 6, 11, 24, 3
IMAGE = (SIDE, SIDE, CHANNELS)


def filled(tree: Any, seed: int = 0) -> Any:
    """Random arrays in place of shapes: making them so is quicker than the frameworks' own initialisation."""
    rng = np.random.default_rng(seed)

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        outs = max(leaf.shape[0], leaf.shape[-1]) if leaf.shape else 1
        values = rng.normal(size=leaf.shape) * np.sqrt(outs / np.prod(leaf.shape))
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape) if len(leaf.shape) == 1 else values, leaf.dtype)

    return jax.tree_util.tree_map(made, tree)


# -- flax nnx --------------------------------------------------------------------------------------------------------


class NnxBlock(nnx.Module):
    def __init__(self, inside, outside, rngs):
        self.conv1 = nnx.Conv(outside, inside, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(inside, rngs=rngs)
        self.depthwise = nnx.Conv(inside, inside, (3, 3), feature_group_count=inside, rngs=rngs)
        self.conv2 = nnx.Conv(inside, outside, (1, 1), rngs=rngs)
        self.norm2 = nnx.BatchNorm(outside, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(x + self.norm2(self.conv2(self.depthwise(y))))


class NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(CHANNELS, 12, (3, 3), rngs=rngs)
        self.blocks = nnx.List([NnxBlock(20, 12, rngs), NnxBlock(16, 12, rngs)])
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(12, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.stem(x)), (2, 2), (2, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x.mean((1, 2))))


class NnxMixerBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.tokens1, self.tokens2 = nnx.Linear(16, 14, rngs=rngs), nnx.Linear(14, 16, rngs=rngs)
        self.channels1, self.channels2 = nnx.Linear(WIDTH, 40, rngs=rngs), nnx.Linear(40, WIDTH, rngs=rngs)

    def __call__(self, x):
        y = jnp.swapaxes(self.norm1(x), 1, 2)
        x = x + jnp.swapaxes(self.tokens2(nnx.gelu(self.tokens1(y))), 1, 2)
        return x + self.channels2(nnx.gelu(self.channels1(self.norm2(x))))


class NnxMixer(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(CHANNELS, WIDTH, (2, 2), strides=(2, 2), rngs=rngs)
        self.blocks = nnx.List([NnxMixerBlock(rngs), NnxMixerBlock(rngs)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.places = nnx.Param(jnp.zeros((TOKENS, WIDTH)))
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 40, rngs=rngs), nnx.Linear(40, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.places[...]
        x = x + self.attention(self.norm1(x))
        x = x + self.down(nnx.gelu(self.up(self.norm2(x))))
        return self.head(x)


# -- flax linen ------------------------------------------------------------------------------------------------------


class LinenBlock(nn.Module):
    inside: int

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Conv(self.inside, (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.Conv(self.inside, (3, 3), feature_group_count=self.inside)(y)
        y = nn.Conv(x.shape[-1], (1, 1))(y)
        return nn.relu(x + nn.BatchNorm(use_running_average=not train)(y))


class LinenCnn(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.max_pool(nn.relu(nn.Conv(12, (3, 3))(x)), (2, 2), (2, 2))
        x = LinenBlock(16)(LinenBlock(20)(x, train), train)
        return nn.Dense(CLASSES)(nn.Dropout(0.2, deterministic=not train)(x.mean((1, 2))))


class LinenMixerBlock(nn.Module):
    def setup(self):
        self.norm1, self.norm2 = nn.LayerNorm(), nn.LayerNorm()
        self.tokens1, self.tokens2 = nn.Dense(14), nn.Dense(16)
        self.channels1, self.channels2 = nn.Dense(40), nn.Dense(WIDTH)

    def __call__(self, x):
        y = jnp.swapaxes(self.norm1(x), 1, 2)
        x = x + jnp.swapaxes(self.tokens2(nn.gelu(self.tokens1(y))), 1, 2)
        return x + self.channels2(nn.gelu(self.channels1(self.norm2(x))))


class LinenMixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (2, 2), strides=(2, 2))(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for _ in range(2):
            x = LinenMixerBlock()(x)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(1))


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(WORDS, WIDTH)(tokens)
        x = x + self.param("places", nn.initializers.zeros, (TOKENS, WIDTH))
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(40)(nn.RMSNorm()(x))))
        return nn.Dense(CLASSES)(x)


# -- equinox: modules of one example ---------------------------------------------------------------------------------


class EqxBlock(eqx.Module):
    conv1: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d

    def __init__(self, inside, outside, key):
        keys = jax.random.split(key, 3)
        self.conv1 = eqx.nn.Conv2d(outside, inside, 3, padding=1, use_bias=False, key=keys[0])
        self.depthwise = eqx.nn.Conv2d(inside, inside, 3, padding=1, groups=inside, key=keys[1])
        self.conv2 = eqx.nn.Conv2d(inside, outside, 1, key=keys[2])

    def __call__(self, x):
        return jax.nn.relu(x + self.conv2(self.depthwise(jax.nn.relu(self.conv1(x)))))


class EqxCnn(eqx.Module):
    stem: eqx.nn.Conv2d
    blocks: list[EqxBlock]
    pool: eqx.nn.MaxPool2d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.stem = eqx.nn.Conv2d(CHANNELS, 12, 3, padding=1, key=keys[0])
        self.blocks = [EqxBlock(20, 12, keys[1]), EqxBlock(16, 12, keys[2])]
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.head = eqx.nn.Linear(12, CLASSES, key=keys[3])

    def __call__(self, x):
        x = self.pool(jax.nn.relu(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class EqxMixerBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    tokens: eqx.nn.MLP
    channels: eqx.nn.MLP

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.tokens = eqx.nn.MLP(16, 16, 14, 1, jax.nn.gelu, key=first)
        self.channels = eqx.nn.MLP(WIDTH, WIDTH, 40, 1, jax.nn.gelu, key=second)

    def __call__(self, x):
        x = x + jax.vmap(self.tokens)(jax.vmap(self.norm1)(x).T).T
        return x + jax.vmap(self.channels)(jax.vmap(self.norm2)(x))


class EqxMixer(eqx.Module):
    patches: eqx.nn.Conv2d
    blocks: list[EqxMixerBlock]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.patches = eqx.nn.Conv2d(CHANNELS, WIDTH, 2, 2, key=keys[0])
        self.blocks = [EqxMixerBlock(keys[1]), EqxMixerBlock(keys[2])]
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=keys[3])

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1).T
        for block in self.blocks:
            x = block(x)
        return self.head(jax.vmap(self.norm)(x).mean(0))


class EqxTransformer(eqx.Module):
    embed: eqx.nn.Embedding
    places: jax.Array
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.embed = eqx.nn.Embedding(WORDS, WIDTH, key=keys[0])
        self.places = jnp.zeros((TOKENS, WIDTH))
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.RMSNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, use_query_bias=True, key=keys[1])
        self.up, self.down = eqx.nn.Linear(WIDTH, 40, key=keys[2]), eqx.nn.Linear(40, WIDTH, key=keys[3])
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=keys[4])

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens) + self.places
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y)
        x = x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm2)(x))))
        return jax.vmap(self.head)(x)


# -- a plain function ------------------------------------------------------------------------------------------------


def mlp(params, x):
    for layer in params["hidden"]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params["out"]


def mlp_params():
    shapes = {"hidden": [{"w": (7, 24), "b": (24,)}, {"w": (24, 16), "b": (16,)}], "out": (16, CLASSES)}
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return filled(jax.tree_util.tree_map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape))


# -- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network, an input of batch 2, and what else its conversion needs."""

    source: Any
    x: np.ndarray
    options: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> list[tuple[str, Any]]:
        """The arrays of numbers by path."""
        tree = self.options.get("params", self.source)
        tree = nnx.split(tree, nnx.Not(nnx.RngState), ...)[1] if isinstance(tree, nnx.Module) else tree
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return [(jax.tree_util.keystr(p), a) for p, a in leaves if eqx.is_array(a)]


def images(batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, *IMAGE)).astype(np.float32)


def first_channels(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def tokens(batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, WORDS, (batch, TOKENS)).astype(np.int32)


def _nnx(kind: Callable[..., Any], x: np.ndarray) -> Case:
    definition, state = nnx.split(nnx.eval_shape(lambda: kind(nnx.Rngs(0))))
    return Case(nnx.merge(definition, filled(state)), x)


def _linen(module: nn.Module, x: np.ndarray) -> Case:
    return Case(module, x, {"params": filled(jax.eval_shape(module.init, jax.random.key(0), x))})


def _eqx(kind: Callable[..., Any], x: np.ndarray) -> Case:
    return Case(filled(eqx.filter_eval_shape(kind, jax.random.key(0))), x, {"vmap": True})


CASES: dict[str, Callable[[], Case]] = {
    "nnx_cnn": lambda: _nnx(NnxCnn, images()),
    "nnx_mixer": lambda: _nnx(NnxMixer, images()),
    "nnx_transformer": lambda: _nnx(NnxTransformer, tokens()),
    "linen_cnn": lambda: _linen(LinenCnn(), images()),
    "linen_mixer": lambda: _linen(LinenMixer(), images()),
    "linen_transformer": lambda: _linen(LinenTransformer(), tokens()),
    "eqx_cnn": lambda: _eqx(EqxCnn, first_channels(images())),
    "eqx_mixer": lambda: _eqx(EqxMixer, first_channels(images())),
    "eqx_transformer": lambda: _eqx(EqxTransformer, tokens()),
    "mlp": lambda: Case(mlp, np.random.default_rng(0).normal(size=(2, 7)).astype(np.float32), {"params": mlp_params()}),
}


@cache
def case(name: str) -> Case:
    return CASES[name]()


@cache
def converted(name: str) -> Imported:
    made = case(name)
    return convert(made.source, made.x, **made.options)
