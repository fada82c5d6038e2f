"""Which versions of megatron-core are taken, and of which a line warns."""

import importlib.metadata
import logging

import pytest

from qtarget_megatron.megatron.runtime import launch


@pytest.mark.parametrize("version", ["0.19.2", "0.19.10", "0.20.0", "0.20.0rc0", "0.20.0.dev0+abc", "0.20.1"])
def test_these_are_taken_and_what_is_not_tested_is_said(monkeypatch, caplog, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with caplog.at_level(logging.WARNING, logger="qtarget_megatron"):
        launch.check_version()
        launch.tell_version()
    assert [f"megatron-core {version}: " in message for message in caplog.messages] == [True][: "0.20" in version]


@pytest.mark.parametrize("version", ["0.19.1", "0.18.5", "0.21.0", "0.21.0rc0", "1.0.0", "0.2"])
def test_others_are_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ValueError, match=f"needs megatron-core >= 0.19.2, < 0.21, found {version}"):
        launch.check_version()
