"""OpenSSH by way of ``toppy ssh-proxy``."""

from __future__ import annotations

import subprocess
from pathlib import Path

from integration.programs.payload import MIB, blocks, digest, digest_of
from integration.programs.servers import SshServer
from integration.programs.through import SHELL, environment, in_one_process, need, ran

pytestmark = in_one_process

_BYTES = 32 * MIB


def test_a_command_runs_and_its_input_output_and_status_come_through(
    ssh_server: SshServer,
) -> None:
    ssh = [need("ssh", "openssh-client"), "-F", str(ssh_server.config), SHELL]
    done = subprocess.run(
        [*ssh, "tr a-z A-Z; echo to standard error >&2; exit 7"],
        input="through the gateway\n",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "THROUGH THE GATEWAY\n"
    assert done.stderr == "to standard error\n"
    assert done.returncode == 7


def test_scp_carries_a_file_there_and_back(ssh_server: SshServer, tmp_path: Path) -> None:
    scp = [need("scp", "openssh-client"), "-F", str(ssh_server.config)]
    with (tmp_path / "here").open("wb") as file:
        file.writelines(blocks(_BYTES))
    ran([*scp, tmp_path / "here", f"{SHELL}:{tmp_path}/there"])
    assert digest_of([(tmp_path / "there").read_bytes()]) == digest(_BYTES)
    ran([*scp, f"{SHELL}:{tmp_path}/there", tmp_path / "back"])
    assert digest_of([(tmp_path / "back").read_bytes()]) == digest(_BYTES)


def test_a_server_behind_the_first_one_is_reached(ssh_server: SshServer) -> None:
    ssh = [need("ssh", "openssh-client"), "-F", str(ssh_server.config)]
    assert ran([*ssh, "-J", SHELL, "inner", "echo inner"]) == "inner\n"
