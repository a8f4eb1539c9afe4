"""`python -m plugins.native.build`: compiles the engine's twin for this machine. Without a compiler, runs
stay in Python."""

from __future__ import annotations

import sys

from . import library


def main() -> int:
    if problem := library.build():
        print(f"native engine: {problem}; simulated runs stay in Python")
        return 0
    print(f"native engine: {library.path()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
