"""The subcommands of `dalle-jax`: a function each, whose docstring is its help."""
