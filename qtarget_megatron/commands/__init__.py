"""The command qtarget: main.py starts a subcommand, each other module is one, or what some have in common."""
