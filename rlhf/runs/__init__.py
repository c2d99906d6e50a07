"""A run's files on disk, its checkpoints, and how it resumes."""
