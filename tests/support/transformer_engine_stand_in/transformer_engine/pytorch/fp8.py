"""Quantization that is off."""

import contextlib


class FP8GlobalStateManager:
    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        return False

    @classmethod
    def reset(cls) -> None:
        pass


def fp8_autocast(enabled: bool = False, **unused):
    return _off(enabled)


def fp8_model_init(enabled: bool = False, **unused):
    return _off(enabled)


def _off(enabled: bool):
    if enabled:
        raise NotImplementedError("the stand-in for Transformer Engine has no quantization")
    return contextlib.nullcontext()
