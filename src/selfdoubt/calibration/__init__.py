"""Calibration: heads that turn scores into ``p_correct``, and the threshold of a guaranteed accuracy.

They are fitted on judged answers and stored in an adapter.
"""
