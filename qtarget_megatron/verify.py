"""``python -m qtarget_megatron.verify``, also under torchrun: qtarget verify."""

from qtarget_megatron.commands.main import run

if __name__ == "__main__":
    run("verify")
