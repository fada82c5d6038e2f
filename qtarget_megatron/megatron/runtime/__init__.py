"""How Megatron is started: its entry points, flags, ranks and logs, and the CPU platform."""
