"""What can go wrong: what is checked before a training and in it, what is said, how a process ends."""
