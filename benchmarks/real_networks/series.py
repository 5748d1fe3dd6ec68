"""A seizure detector for intracranial EEG, on made-up recordings: 1/f noise, rhythms, mains hum, discharges."""

from __future__ import annotations

import numpy as np
from scipy import signal

from real_networks.base import Array, Inputs, Network, Outputs, Place, Scores, in_package, percent, seeded

RATE, SECONDS, BINS = 200, 300, 100  # Hz, s, bins of 1 Hz


def spectrogram(recording: Array) -> Array:
    """Return a normalised spectrogram as the package makes it, (100, 599).

    Segments of 1 s every 0.5 s, each bin of mean 0 and deviation 1 over time.
    """
    scaled = (recording - recording.mean()) / recording.std()
    _, _, power = signal.spectrogram(scaled, RATE, nperseg=RATE, noverlap=RATE // 2)
    kept = power[:BINS]
    return np.asarray((kept - kept.mean(axis=1, keepdims=True)) / kept.std(axis=1, keepdims=True), np.float32)


def recording(rng: np.random.Generator) -> Array:
    """Make one channel: (samples,)."""
    samples = RATE * SECONDS
    time = np.arange(samples) / RATE
    wave = _coloured(rng, samples, rng.uniform(0.8, 2.2))
    for low, high in ((2, 4), (4, 8), (8, 13), (13, 30), (30, 80)):
        rhythm = np.sin(2 * np.pi * (rng.uniform(low, high) * time + 0.05 * np.cumsum(rng.normal(size=samples)) / RATE))
        wave += rng.uniform(0, 0.4) * rhythm * np.abs(_coloured(rng, samples, 1.5))
    wave += rng.uniform(0, 0.1) * np.sin(2 * np.pi * float(rng.choice([50, 60])) * time)
    for _ in range(int(rng.integers(0, 4))):
        wave += _discharge(rng, time)
    return wave


def _coloured(rng: np.random.Generator, samples: int, power: float) -> Array:
    """Return noise whose power falls with so high a power of the frequency, of deviation 1."""
    spectrum = np.fft.rfft(rng.normal(size=samples))
    spectrum[1:] *= np.arange(1, len(spectrum)) ** (-power / 2)
    spectrum[0] = 0
    wave = np.fft.irfft(spectrum, samples)
    return np.asarray(wave / wave.std())


def _discharge(rng: np.random.Generator, time: Array) -> Array:
    """Return a run of sharp waves that slows down, as in a seizure."""
    length, start = rng.uniform(5, 60), rng.uniform(0, SECONDS - 10)
    inside = (time - start) / length
    rate = rng.uniform(5, 14) * (1 - 0.6 * inside.clip(0, 1))
    phase = np.cumsum(np.where((inside > 0) & (inside < 1), rate, 0)) / RATE
    envelope = np.where((inside > 0) & (inside < 1), np.sin(np.pi * inside.clip(0, 1)) ** 0.5, 0)
    return np.asarray(rng.uniform(1, 8) * envelope * np.exp(4 * (np.cos(2 * np.pi * phase) - 1)))


def series_inputs(place: Place, part: int, count: int) -> Inputs:
    """Make recordings and their spectrograms."""
    rng = seeded(part, 10)
    return Inputs(feeds={"x": np.stack([spectrogram(recording(rng)) for _ in range(count)])}, batch=8)


def logit_score(inputs: Inputs, dense: Outputs, found: Outputs) -> Scores:
    """Return the squared error of the logits over their variance, and the share of steps of the same class."""
    a, b = dense["logits"], found["logits"]
    error = np.square(a - b).sum() / np.square(a - a.mean(axis=(0, 1))).sum()
    return {"logit error": float(error), "same class": percent(a.argmax(axis=-1) == b.argmax(axis=-1))}


NETWORKS = (
    Network(
        name="seizure",
        title="seizure CNN with BiLSTM",
        metric="relative logit error",
        find=in_package("brainmaze_eeg_models/seizure/_models/modelA_paper.onnx"),
        inputs=series_inputs,
        score=logit_score,
        tests=48,
        most=128,
    ),
)
