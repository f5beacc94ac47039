"""The command line: a file for each command, and `main`, which finds it."""
