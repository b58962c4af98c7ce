"""How what ships was made. Not part of the installed package."""
