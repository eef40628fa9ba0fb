"""`--config=config/hpsv2.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.hpsv2 import get_config

__all__ = ["get_config"]
