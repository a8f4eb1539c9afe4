"""The command line: Hydra, the folders of runs and sweeps, `python -m headway`. The one room of core that may import Hydra."""

from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"  # Hydra's groups
