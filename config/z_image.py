"""`--config=config/z_image.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.z_image import get_config

__all__ = ["get_config"]
