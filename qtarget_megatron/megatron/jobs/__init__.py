"""What is done with a frozen model: convert, compare with transformers, score, cache a teacher."""
