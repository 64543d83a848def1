"""The config: schema, strict reader, and its reference in words."""

from .load import dump_config, load_config, parse_config
from .schema import Config

__all__ = ["Config", "dump_config", "load_config", "parse_config"]
