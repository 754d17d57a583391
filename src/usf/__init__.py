"""Uniformly scaling flows."""
