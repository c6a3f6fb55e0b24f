"""Subcommands of the command line, a module each: `add_parser` defines it, `run` carries it out. `parts` is what they share."""
