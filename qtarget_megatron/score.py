"""``python -m qtarget_megatron.score``, also under torchrun: qtarget score."""

from qtarget_megatron.commands.main import run

if __name__ == "__main__":
    run("score")
