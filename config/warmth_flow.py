"""`--config=config/warmth_flow.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.warmth_flow import get_config

__all__ = ["get_config"]
