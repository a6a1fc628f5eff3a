"""One training loop for every stage, its state, its checkpoints and its log."""
