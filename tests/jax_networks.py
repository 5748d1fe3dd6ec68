"""Small networks in flax (nnx, linen), equinox and plain JAX, of the same three architectures."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

CLASSES, SIDE, CHANNELS = 10, 8, 3  # images of SIDE x SIDE
TOKENS, WORDS, WIDTH, HEADS = 6, 11, 24, 3
IMAGE = (SIDE, SIDE, CHANNELS)


def shaken(tree, seed=0):
    """All arrays of floats moved a little, so that no bias is zero and no statistic is trivial."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree_util.tree_unflatten(structure, [_shaken(a, k) for a, k in zip(leaves, keys, strict=True)])


def _shaken(leaf, key):
    if not eqx.is_inexact_array(leaf):
        return leaf
    return leaf + jax.random.uniform(key, leaf.shape, leaf.dtype, 0.0, 0.3)


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
    keys = jax.random.split(jax.random.key(3), 3)
    hidden = [
        {"w": jax.random.normal(k, s) * s[0] ** -0.5, "b": jnp.zeros(s[1])}
        for k, s in zip(keys, ((7, 24), (24, 16)), strict=False)
    ]
    return shaken({"hidden": hidden, "out": jax.random.normal(keys[2], (16, CLASSES))})
