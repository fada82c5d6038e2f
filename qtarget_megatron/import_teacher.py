"""``python -m qtarget_megatron.import_teacher``: qtarget import-teacher."""

from qtarget_megatron.commands.main import run

if __name__ == "__main__":
    run("import-teacher")
