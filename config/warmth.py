"""`--config=config/warmth.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.warmth import get_config

__all__ = ["get_config"]
