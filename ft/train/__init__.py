"""What happens: the loop, the optimizer, the log."""
