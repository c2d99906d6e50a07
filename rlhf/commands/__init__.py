"""The command line, and commands to call from a shell."""
