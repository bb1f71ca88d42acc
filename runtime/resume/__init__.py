"""Runs that survive: checkpoints, what a run is made of, and how it goes on."""
