"""Made-up sound: speech-like, music-like, noise and silence.

Networks that listen answer steady noise by a few of their channels. Speech is voiced syllables with formants and a
moving pitch, hisses and pauses; music is notes with onsets and harmonics. Neither says anything here.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
Rng = np.random.Generator
RATE = 16_000  # samples per second; what it is hardly matters, for voices differ by more
HARMONICS = 32
SEGMENT = (0.05, 0.3)  # seconds of a syllable, a hiss or a pause
NOTE = (0.1, 0.8)  # seconds
FORMANTS = ((250.0, 900.0), (800.0, 2400.0), (2200.0, 3200.0))  # Hz, the ranges of the first three
BANDWIDTHS = (90.0, 130.0, 200.0)  # Hz
VOICED, HISSING = 0.55, 0.25  # fractions of segments; the others are pauses
MUSIC, NOISE = 0.2, 0.15  # fractions of sounds; the others are speech
LOUDEST, QUIETEST = 0.9, 0.02  # peaks
BACKGROUND = (-70.0, -20.0)  # dB of the noise below a sound's peak


def sounds(count: int, length: int, rng: Rng) -> Array:
    """Make up sounds.

    Args:
        count: the number of sounds.
        length: samples of each, :data:`RATE` a second.
        rng: the source of randomness.

    Returns:
        Values in [-1, 1], float32, of shape (count, length).

    >>> made = sounds(3, 8000, np.random.default_rng(0))
    >>> made.shape, made.dtype, bool(np.abs(made).max() <= 1)
    ((3, 8000), dtype('float32'), True)
    """
    return np.stack([_sound(length, rng) for _ in range(count)]) if count else np.empty((0, length), np.float32)


def levelled(windows: Array) -> Array:
    """Return windows of sound, (…, samples), each with mean 0 and deviation 1; silence stays silence."""
    centred = windows - windows.mean(axis=-1, keepdims=True)
    spread = centred.std(axis=-1, keepdims=True)
    made: Array = (centred / np.where(spread > 0, spread, 1)).astype(windows.dtype)
    return made


def _sound(length: int, rng: Rng) -> Array:
    kind = rng.random()
    content = (
        _music(length, rng) if kind < MUSIC else np.zeros(length) if kind < MUSIC + NOISE else _speech(length, rng)
    )
    content = content / max(float(np.abs(content).max()), 1e-9)
    level = 10 ** (rng.uniform(*BACKGROUND) / 20)
    mixed = content + level * _coloured(length, rng)
    peak = QUIETEST * (LOUDEST / QUIETEST) ** rng.random()
    return (peak * mixed / max(float(np.abs(mixed).max()), 1e-9)).astype(np.float32)


def _segments(length: int, seconds: tuple[float, float], rng: Rng) -> tuple[Array, int]:
    """Cut time into pieces of random lengths; return for each sample the piece that it lies in, and their number."""
    shortest, longest = (max(1, int(s * RATE)) for s in seconds)
    sizes = rng.integers(shortest, longest + 1, length // shortest + 2)
    piece = np.searchsorted(np.cumsum(sizes), np.arange(length) + int(rng.integers(sizes[0])), side="right")
    return piece, int(piece[-1]) + 1


def _smooth(values: Array, seconds: float) -> Array:
    """Return values averaged over a time around each, along the last axis."""
    width = max(1, int(seconds * RATE))
    padded = np.concatenate([values[..., :1].repeat(width, -1), values, values[..., -1:].repeat(width, -1)], axis=-1)
    total = np.cumsum(padded, axis=-1)
    means: Array = (total[..., width:] - total[..., :-width])[..., width // 2 : width // 2 + values.shape[-1]] / width
    return means


def _speech(length: int, rng: Rng) -> Array:
    """Return syllables of one voice between hisses and pauses."""
    piece, number = _segments(length, SEGMENT, rng)
    kinds = rng.random(number)
    loud = rng.uniform(0.2, 1, number)
    voiced = _smooth((loud * (kinds < VOICED))[piece], 0.02)
    hissing = _smooth((loud * ((kinds >= VOICED) & (kinds < VOICED + HISSING)))[piece], 0.01)
    pitch = rng.uniform(80, 260) * np.exp2(_smooth(rng.normal(0, 0.25, number)[piece], 0.1))
    order = np.arange(1, HARMONICS + 1)[:, None]
    frequency = order * pitch
    gain = np.zeros_like(frequency)
    for (low, high), width in zip(FORMANTS, BANDWIDTHS, strict=True):
        centre = _smooth(rng.uniform(low, high, number)[piece], 0.05)
        gain += 1 / (1 + np.square((frequency - centre) / width))
    voice = (np.sin(order * (2 * np.pi * np.cumsum(pitch) / RATE)) * gain / order**0.5).sum(axis=0)
    white = rng.standard_normal(length)
    hiss = np.diff(white, prepend=0.0)  # louder with the frequency
    return voiced * voice + 0.3 * hissing * hiss


def _music(length: int, rng: Rng) -> Array:
    """Return some voices of notes that are struck and fade."""
    total = np.zeros(length)
    order = np.arange(1, HARMONICS // 4 + 1)[:, None]
    for _ in range(int(rng.integers(1, 5))):
        piece, number = _segments(length, NOTE, rng)
        pitch = (110 * np.exp2(rng.integers(0, 36, number) / 12))[piece]
        begins = np.maximum.accumulate(np.where(np.diff(piece, prepend=-1) > 0, np.arange(length), 0))
        fading = np.exp(-(np.arange(length) - begins) / RATE * rng.uniform(1, 8))
        timbre = rng.uniform(0, 1, (len(order), 1)) / order
        played = rng.uniform(0.3, 1, number)[piece] * (rng.random(number) < 0.8)[piece]
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        total += played * fading * (timbre * np.sin(order * phase)).sum(axis=0)
    return total


def _coloured(length: int, rng: Rng) -> Array:
    """Return noise of a random slope of its spectrum, from white to brown, with a peak of about one."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** -rng.uniform(0, 1)
    noise: Array = np.fft.irfft(spectrum, length) if length > 1 else np.zeros(length)
    return noise / max(3 * float(noise.std()), 1e-9)
