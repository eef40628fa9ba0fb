"""`--config=config/flux.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.flux import get_config

__all__ = ["get_config"]
