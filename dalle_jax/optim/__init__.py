"""Schedules and optimizers."""
