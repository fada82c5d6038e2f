"""Forgetting Megatron's global state, so that one process can run several layouts after another."""


def reset() -> None:
    """Return Megatron to where it was before it was initialised; call it on every rank."""
    from qtarget_megatron.megatron.runtime import launch

    launch.forget()
