"""The packages that the real engine needs, which a simulation does without."""

from __future__ import annotations

from importlib.util import find_spec

from headway import ConfigError

PACKAGES = ("torch", "safetensors", "tokenizers", "jinja2")  # of the extra [torch]


def check_installed() -> None:
    """Raises ConfigError for what is missing, before anything imports it."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        lacks = (
            f"executor=torch needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed"
        )
        raise ConfigError(
            f'{lacks}: `pip install -e ".[torch]"` in the checkout, or set executor=sim, which computes no '
            "tokens"
        )
