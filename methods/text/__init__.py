"""Text as the models read it: phrases, their tokens and states, and new words."""
