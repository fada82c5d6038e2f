"""Commands beside finetune, each a module: ``python -m qtarget_megatron.commands.convert_hf``, or under torchrun."""
