"""Readers of question sets and instruction data: files and sets on the hub -> typed records.

Training and evaluation read through them alike: JSON, JSONL, CSV, TSV, Parquet, TruthfulQA's and the hub's.
"""
