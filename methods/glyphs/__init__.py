"""The glyphs world: digits on textures, their captions and their judge."""
