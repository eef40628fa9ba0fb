"""`--config=config/imagereward.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.imagereward import get_config

__all__ = ["get_config"]
