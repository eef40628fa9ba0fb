"""`--config=config/sdxl.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.sdxl import get_config

__all__ = ["get_config"]
