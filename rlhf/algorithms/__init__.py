"""What an algorithm is, and the algorithms: rewards -> advantages -> loss. One file each; torch only."""
