"""``python -m qtarget_megatron.inspect``, also under torchrun: qtarget inspect."""

from qtarget_megatron.commands.main import run

if __name__ == "__main__":
    run("inspect")
