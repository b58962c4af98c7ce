"""Adapter folders: voters, LoRA in PEFT's own files, and their export for other tools."""
