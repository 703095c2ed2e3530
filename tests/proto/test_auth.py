from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proto import auth

SECRET = b"correct horse battery staple"
NONCES = {"opener_nonce": b"o" * 32, "listener_nonce": b"l" * 32}
both_provers = pytest.mark.parametrize("prover", [auth.OPENER, auth.LISTENER])


@both_provers
def test_a_proof_holds_for_who_made_it(prover):
    assert auth.holds(auth.prove(SECRET, prover, **NONCES), SECRET, prover, **NONCES)


@both_provers
def test_a_proof_does_not_hold_for_the_other_side(prover):
    other = auth.LISTENER if prover is auth.OPENER else auth.OPENER
    assert not auth.holds(auth.prove(SECRET, prover, **NONCES), SECRET, other, **NONCES)


@both_provers
def test_a_proof_does_not_hold_with_the_nonces_exchanged(prover):
    exchanged = {"opener_nonce": b"l" * 32, "listener_nonce": b"o" * 32}
    assert not auth.holds(auth.prove(SECRET, prover, **exchanged), SECRET, prover, **NONCES)


@given(other=st.binary(min_size=16, max_size=64))
def test_a_proof_does_not_hold_for_another_secret(other):
    assume(other != SECRET)
    mac = auth.prove(other, auth.OPENER, **NONCES)
    assert not auth.holds(mac, SECRET, auth.OPENER, **NONCES)


@given(nonce=st.binary(min_size=32, max_size=32), which=st.sampled_from(sorted(NONCES)))
def test_a_proof_does_not_hold_for_another_nonce(nonce, which):
    assume(nonce != NONCES[which])
    mac = auth.prove(SECRET, auth.OPENER, **{**NONCES, which: nonce})
    assert not auth.holds(mac, SECRET, auth.OPENER, **NONCES)


def test_a_proof_does_not_hold_for_another_version(monkeypatch):
    monkeypatch.setattr(auth, "PROTOCOL_VERSION", auth.PROTOCOL_VERSION + 1)
    mac = auth.prove(SECRET, auth.OPENER, **NONCES)
    monkeypatch.undo()
    assert not auth.holds(mac, SECRET, auth.OPENER, **NONCES)


def test_the_bytes_of_a_proof_stay_as_they_are():
    assert (
        auth.prove(SECRET, auth.OPENER, **NONCES).hex()
        == "6ddd9933fd248bf587c486f9bcec6d6fb46facde3e6e9fc945893ab040a16cfd"
    )
    assert (
        auth.prove(SECRET, auth.LISTENER, **NONCES).hex()
        == "99654c2e8cc64e5d52f7ddd004f7aeffb2f36c5ca96549c05b5bdaf5295433bf"
    )
