"""Imported first: from here on Python looks for garbage less often.

Importing and parsing make many small objects that stay, and looking through them for cycles, again and again, is a
twentieth of a cold ``spa prune``. Longer work makes few cycles.
"""

from __future__ import annotations

import gc

gc.set_threshold(50_000, 20, 20)
