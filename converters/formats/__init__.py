"""Names: what a file is, and whose layout its tensors follow."""
