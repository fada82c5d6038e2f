"""``python -m qtarget_megatron COMMAND``: the command qtarget."""

from qtarget_megatron.commands.main import main

if __name__ == "__main__":
    main()
