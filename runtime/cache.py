"""The user's cache folder: compiled kernels, and notes on artifacts whose digests were checked on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$OPTC_CACHE, else $XDG_CACHE_HOME/optc, else ~/.cache/optc. It may not exist yet."""
    if folder := os.environ.get("OPTC_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "optc"
    return Path.home() / ".cache" / "optc"
