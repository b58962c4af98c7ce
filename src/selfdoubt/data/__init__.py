"""Rows of data files and of sets on the hub, and what their columns mean: one reader for training and for questions."""
