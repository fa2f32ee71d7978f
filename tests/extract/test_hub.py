"""A hub that cannot be reached is not waited for; one behind a proxy, or in reach, is asked as always."""

import socket

import huggingface_hub.constants as settings
import pytest

from brainenc.extract.backbones import hub


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    for name in hub._PROXIES:
        monkeypatch.delenv(name, raising=False)
    hub._can_be_named.cache_clear()
    yield
    hub._can_be_named.cache_clear()


def unreachable(*_args, **_kwargs):
    raise socket.gaierror("no such name")


def test_an_unreachable_hub_is_not_asked(monkeypatch):
    """Where the hub's name has no address, its client looks into its cache only, and is as before afterwards."""
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with hub.cache_only_if_unreachable() as cache_only:
        assert cache_only
        assert settings.is_offline_mode()
    assert not settings.is_offline_mode()


def test_a_hub_in_reach_is_asked(monkeypatch):
    """A name that resolves leaves the client as it was."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: [object()])
    with hub.cache_only_if_unreachable() as cache_only:
        assert not cache_only


def test_a_proxy_may_know_more(monkeypatch):
    """Behind a proxy names need not resolve here."""
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    with hub.cache_only_if_unreachable() as cache_only:
        assert not cache_only


def test_offline_by_choice_stays_offline(monkeypatch):
    """HF_HUB_OFFLINE=1 is the user's word, before and after."""
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: [object()])
    with hub.cache_only_if_unreachable() as cache_only:
        assert cache_only
    assert settings.HF_HUB_OFFLINE
