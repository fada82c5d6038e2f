"""The plug-in to Megatron-Core and megatron.training: the only sub-package that imports them.

Import cpu_platform first where there is no GPU: it has to act before megatron is imported, which is why nothing is
imported here.
"""
