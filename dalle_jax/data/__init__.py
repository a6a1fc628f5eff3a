"""Captioned images: where they come from, checks, code shards, and batches for training."""
