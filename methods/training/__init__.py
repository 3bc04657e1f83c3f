"""The training loop: state, path predicates, sharding table, checkpoints."""
