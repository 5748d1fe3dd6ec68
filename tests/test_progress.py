"""Progress where there is no terminal."""

from __future__ import annotations

import pytest

from spa.cli import bars


@pytest.mark.parametrize("shown", [True, False])
def test_a_log_gets_a_line_now_and_then(
    shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 100.0
    monkeypatch.setattr(bars.time, "monotonic", lambda: clock)
    with bars.progress_bars(shown) as progress:
        for clock, share in ((101.0, 0.1), (116.0, 0.25), (120.0, 0.3), (140.0, 0.5)):  # noqa: B007 - the clock reads it
            progress("reconstruct", share)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "spa: reconstruct 25%, after 16 s\nspa: reconstruct 50%, after 40 s\n"
