"""The runner: a thin loop on optax, orbax, clu and seqio."""
