"""What the subcommands do: the parts put together by name, and the long jobs around a run."""
