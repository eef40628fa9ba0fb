"""`--config=config/qwen_image.py`: the packaged config; edit here or override options."""

from nablagfn.recipes.catalogue.qwen_image import get_config

__all__ = ["get_config"]
