"""``python -m qtarget_megatron.check``, also under torchrun: qtarget check."""

from qtarget_megatron.commands.main import run

if __name__ == "__main__":
    run("check")
