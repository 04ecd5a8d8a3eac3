"""Where things are inside a sandbox: the one place that names them."""

from __future__ import annotations

OWN = "/opt/tartarus"
OWN_BIN = f"{OWN}/bin"
RUNNER = f"{OWN}/runner.py"
WARM_UP_SCRIPT = f"{OWN}/warmup.py"
CA_BUNDLE = f"{OWN}/ca.crt"
VENV = f"{OWN}/venv"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
