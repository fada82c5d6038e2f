"""``python -m qtarget_megatron.import``, also under torchrun: qtarget import."""

from qtarget_megatron.commands.main import run

if __name__ == "__main__":
    run("import")
