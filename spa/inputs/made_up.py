"""Inputs that are made up, where the user gives none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from spa.calibration import sampling
from spa.calibration.data import Calibration, held_out_samples
from spa.calibration.sampling import Sampler
from spa.calibration.synthetic import Synthesiser
from spa.coupling.analysis import Analysis
from spa.coupling.cost import measure
from spa.errors import ModelError
from spa.inputs.runs import running
from spa.request import Request

FEWEST_HELD_OUT = 8  # of which there are as many as wanted
ELSEWHERE = 16  # inputs of another domain, to tell how far a figure carries


def make(analysis: Analysis, request: Request) -> Calibration:
    """Make inputs up, with others that are held out, and a few of a domain that was not used."""
    inputs, seed = request.inputs, request.timing.seed
    maker, notes = _maker(analysis, request)
    with running():
        imagery = maker.imagery(inputs.domain, inputs.mean, inputs.std, request.timing.threads)
        text = maker.text(analysis.graph.base, inputs.text, inputs.tokenizer)
    notes += (*(note for note in (imagery.note, text.note) if note), *maker.notes)

    count = maker.affordable(inputs.samples)
    sampler = _sampler(maker, analysis, count) if inputs.text is None else None
    if sampler is not None:
        notes += (sampler.note,)
    if count < inputs.samples:
        notes += (f"{count} inputs are made up, not {inputs.samples}: more of this size take much memory (see --size)",)

    def made_up(samples: int, add: int, source: str = "synthetic", **how: Any) -> Calibration:
        with running():
            batches = maker.batches(samples, seed=(seed + add) % 2**32, **how)
        made = sum(next((len(a) for a in b.values() if a.ndim), 1) for b in batches)
        return Calibration(batches, None, made, source, notes)

    how: dict[str, Any] = {"imagery": imagery, "text": text, "sampler": sampler}
    other = maker.elsewhere(imagery, text, sampled=sampler is not None)
    return replace(
        made_up(count, 0, **how),
        held_out=made_up(max(held_out_samples(count), FEWEST_HELD_OUT), 1, **how),
        elsewhere=None if other is None else made_up(ELSEWHERE, 2, other.said, imagery=other.imagery, text=other.text),
    )


def _sampler(maker: Synthesiser, analysis: Analysis, samples: int) -> Sampler | None:
    """Return the network as a source of its own inputs, if it is a causal language model and not too large for that."""
    if sampling.ROUNDS * samples * measure(analysis).macs > sampling.MOST_MACS:
        return None
    with running():
        return maker.sampler()


def _maker(analysis: Analysis, request: Request) -> tuple[Synthesiser, tuple[str, ...]]:
    """Prepare to make inputs up, at the sizes of the analysis where onnxruntime takes them; say where it does not."""
    model, seed, chosen = analysis.graph.self_contained(), request.timing.seed, analysis.points.chosen
    value_range = request.inputs.value_range
    with running():
        try:
            return Synthesiser(model, seed, chosen, value_range, mixed=not request.timing.sizes), ()
        except ModelError:
            if not chosen:
                raise
            note = "onnxruntime refuses the sizes at which MACs were counted; inputs were made at others"
            return Synthesiser(model, seed, request.timing.sizes, value_range), (note,)
