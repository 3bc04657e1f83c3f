"""The glyphs world: captioned images from data that ships inside PyPI packages, and its judge."""
