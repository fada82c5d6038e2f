"""``python -m qtarget_megatron.export``, also under torchrun: qtarget export."""

from qtarget_megatron.commands.main import run

if __name__ == "__main__":
    run("export")
