"""`--config=config/flux2_klein.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.flux2_klein import get_config

__all__ = ["get_config"]
