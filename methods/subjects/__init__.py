"""Images of subjects to personalise on, and batches of them."""
