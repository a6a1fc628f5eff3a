"""Captions to tokens."""
