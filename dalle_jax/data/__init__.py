"""Captioned pictures: where they come from, checks, code shards, and batches for training."""
