"""Metrics of risk scores: selective accuracy, ranking, calibration and bootstrap intervals.

Pure functions of numpy arrays; they know no language model and are usable alone.
"""
