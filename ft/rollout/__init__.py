"""Sampling from a policy."""
