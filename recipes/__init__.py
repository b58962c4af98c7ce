"""Recipes that made the files which ship. Not part of the installed package."""
