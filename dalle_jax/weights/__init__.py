"""Weights that others made: the only room that reads foreign formats, without their libraries."""
