"""`--config=config/aesthetic.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.aesthetic import get_config

__all__ = ["get_config"]
