"""The same text over links with certificates, from manager to workers and from worker to worker."""

from __future__ import annotations

import subprocess
import sys

from tests.support.certificates import files_of, folder_of


def generate(*options: str) -> subprocess.CompletedProcess[str]:
    """`manager generate` of a few tokens of the demo model."""
    words = [sys.executable, "-m", "manager", "generate", *options, "--max-new-tokens", "8"]
    return subprocess.run(
        [*words, "Return a list of"], capture_output=True, text=True, timeout=120, check=False
    )


def test_workers_that_are_spawned_with_certificates_speak_tls_among_one_another():
    files = files_of(folder_of())
    tls = ["--tls-cert", files.cert, "--tls-key", files.key, "--tls-ca", files.ca]
    done = generate("--spawn", "2", *map(str, tls))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "2 workers ready" in done.stderr


def test_a_certificate_without_its_key_is_the_callers_mistake():
    done = generate("--spawn", "2", "--tls-cert", str(files_of(folder_of()).cert))
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "manager: --tls-cert without --tls-key and --tls-ca: a link with TLS needs all three"
    )
