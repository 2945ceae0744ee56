"""Sweeps: every run of a study, on one machine or on a Ray cluster."""
