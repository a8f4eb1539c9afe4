"""The command line: Hydra, the folders of runs and sweeps, `python -m headway`. The one room of core that may
import Hydra."""
