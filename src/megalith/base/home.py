"""Where Megalith keeps what it measures and stores: profiles, benchmark records, compiled kernels.

`$MEGALITH_HOME`, else `$XDG_DATA_HOME/megalith`, else `~/.local/share/megalith`.
"""

from __future__ import annotations

import os
from pathlib import Path


def home_dir() -> Path:
    """The folder that holds our files; it may not exist yet."""
    explicit = os.environ.get("MEGALITH_HOME")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "megalith"
