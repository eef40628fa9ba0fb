"""The packaged worlds: every file here defines `WORLD`; its name, - for _, is the world's."""
