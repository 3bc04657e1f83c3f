"""Model families, one per file: what their folders hold, and how their parts work together."""
