"""Complete named runs. Each module has `get_config() -> Config`; use one as `--config=NAME`."""
