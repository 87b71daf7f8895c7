"""The command line: main.py holds the table of commands, and each command is one file with its name."""
