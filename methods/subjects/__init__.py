"""What is learnt from: images of subjects, and batches of them."""
