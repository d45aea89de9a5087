"""What was found out about this machine before: a small JSON file in the user's cache folder."""

import contextlib
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where this platform keeps what programs can find out again; ``XDG_CACHE_HOME`` wins everywhere."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "scmulan"


class Notebook:
    """Entries by key. A file that is damaged counts as empty, one that cannot be written is done without.

    Parameters
    ----------
    name
        Of the file in the cache folder.
    """

    def __init__(self, name: str) -> None:
        self.path = cache_folder() / name

    def get(self, key: str) -> Any:
        """Entry of a key, or None."""
        return self._read().get(key)

    def put(self, key: str, entry: Any) -> None:
        """Keep an entry, whole or not at all: others may read the file meanwhile."""
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({**self._read(), key: entry}, indent=1), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}
