"""RunSpec, the typed and validated form of a composed configuration, and how it is composed."""

from .compose import CONF, INTERRUPTED, RUN, compose_config, entry
from .run_spec import RunSpec

__all__ = ["CONF", "INTERRUPTED", "RUN", "RunSpec", "compose_config", "entry"]
