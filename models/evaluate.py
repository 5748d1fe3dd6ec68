"""Top-1 accuracy of an ONNX classifier.

    python models/evaluate.py MODEL [DATA.npz]

`DATA.npz` holds `input` and `label`; by default it is the digits' test split beside this script.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime as ort


def accuracy(model: str | bytes, images: np.ndarray, labels: np.ndarray, batch: int = 256) -> float:
    """Return the fraction of the images whose largest logit is their label.

    Args:
        model: path or serialised model: images in, logits [n classes] first among what comes out.
        images: float32 [n ...].
        labels: int64 [n].
        batch: images per run.

    Returns:
        The accuracy in 0 .. 1.
    """
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [
        session.run(None, {name: images[start : start + batch]})[0].argmax(-1) for start in range(0, len(images), batch)
    ]
    return float((np.concatenate(parts) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="?", default=Path(__file__).parent / "digits_test.npz")
    arguments = parser.parse_args()
    with np.load(arguments.data) as data:
        print(f"{accuracy(arguments.model, data['input'], data['label']):.4f}")


if __name__ == "__main__":
    main()
