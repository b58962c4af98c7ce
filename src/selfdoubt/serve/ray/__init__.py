"""Replicas: more engines than one, on one machine or many, by Ray Serve."""
