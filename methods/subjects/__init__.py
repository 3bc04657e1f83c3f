"""Images of subjects to personalize on, and batches of them."""
