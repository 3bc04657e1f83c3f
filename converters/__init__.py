"""What travels: PyTorch weights in and out."""
