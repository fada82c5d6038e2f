"""``python -m qtarget_megatron.plan``, also under torchrun: qtarget plan."""

from qtarget_megatron.commands.main import run

if __name__ == "__main__":
    run("plan")
