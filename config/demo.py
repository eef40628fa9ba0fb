"""`--config=config/demo.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.demo import get_config

__all__ = ["get_config"]
