"""``python -m qtarget_megatron.generate``: qtarget generate."""

from qtarget_megatron.commands.main import run

if __name__ == "__main__":
    run("generate")
