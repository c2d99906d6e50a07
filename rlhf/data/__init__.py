"""Data sets: reads rows from files or the hub and turns them into token ids."""
