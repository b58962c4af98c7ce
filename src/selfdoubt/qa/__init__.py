"""Selective question answering: ask a set of questions, judge the answers, measure each score, calibrate, report."""
