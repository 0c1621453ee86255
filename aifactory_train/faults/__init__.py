"""Signals and guards."""
