"""Complete settings by name: the shipped configs, those of the worlds, and the command line's."""
