"""`python -m plugins.native.followed`: notes the Python files that the compiled engine follows, as they are.

Whoever changes a policy or the core in place, as research does, must get what the changed file decides and
not what the compiled engine was written after. So a run is compiled only while all these files are as they
were noted.
"""

from __future__ import annotations

import json
from functools import cache
from hashlib import blake2b
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTE = Path(__file__).with_name("followed.json")
PLUGINS = (
    *(f"schedulers/{name}.py" for name in (
        "chunked", "prefill_first", "order/fcfs", "victim/newest", "admission/always",
    )),
    *(f"cache/{name}.py" for name in ("hash", "none", "eviction/lru")),
    *(f"executors/{name}.py" for name in ("cost", "profile", "sim")),
)  # fmt: skip


def files() -> list[str]:
    """The core's heart, whole, and every policy and clock that has a twin."""
    heart = sorted(f"core/{file.name}" for file in (ROOT / "core").glob("*.py"))
    return [*heart, *(f"plugins/{name}" for name in PLUGINS)]


def digests() -> dict[str, str]:
    return {name: _digest((ROOT / name).read_bytes()) for name in files()}


def _digest(source: bytes) -> str:
    return blake2b(source.replace(b"\r\n", b"\n"), digest_size=8).hexdigest()


@cache
def changed() -> str:
    """The first file that is not as it was when the compiled engine was last compared with it; "" where all
    are."""
    noted: dict[str, str] = json.loads(NOTE.read_text())
    return next((name for name, digest in digests().items() if noted.get(name) != digest), "")


def main() -> None:
    found = digests()
    NOTE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} files are noted in {NOTE.name}: now run tests/test_native.py")


if __name__ == "__main__":
    main()
