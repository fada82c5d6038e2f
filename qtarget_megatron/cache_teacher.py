"""``python -m qtarget_megatron.cache_teacher``, also under torchrun: qtarget cache-teacher."""

from qtarget_megatron.commands.main import run

if __name__ == "__main__":
    run("cache-teacher")
