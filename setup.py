"""Headway is installed in place (`pip install -e .`): its folders are called core, plugins and conf, which no
other package may meet."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

REFUSAL = """
headway builds no wheel: it would put `core`, `plugins` and `hydra_plugins` into site-packages, where any
other package may have the same names, and leave out conf/ and run.py. Install a checkout in place:
`pip install -e PATH_OF_THE_CHECKOUT`.
A plugin is a package of its own (`python -m headway new order mypaper`) and installs as any other.
"""


class NoWheel(bdist_wheel):
    """Building in place asks this command for its tag alone; `run` is what makes a wheel."""

    def run(self) -> None:
        raise SystemExit(REFUSAL)


setup(cmdclass={"bdist_wheel": NoWheel})
