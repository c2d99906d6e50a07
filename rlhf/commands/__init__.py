"""What a shell calls."""
