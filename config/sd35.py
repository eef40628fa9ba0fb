"""`--config=config/sd35.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.sd35 import get_config

__all__ = ["get_config"]
