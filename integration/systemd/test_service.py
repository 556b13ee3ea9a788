"""The unit under a real systemd: start, reload, crash, watchdog, restart, stop, under load."""

from __future__ import annotations

import json
import re
import signal

import pytest

from integration.processes import wait_until
from integration.systemd.service import CONFIG, PROJECT, UNIT, Service, install

pytestmark = [pytest.mark.xdist_group("systemd"), pytest.mark.timeout(400)]
DROPIN = PROJECT / "systemd" / "toppy-gw.service.d" / "older-systemd.conf"
A_WATCHDOG = "[Service]\nWatchdogSec=3s\n"


def test_service_is_active_once_it_serves_and_relays(service: Service) -> None:
    machine = service.machine
    assert machine.property("Type") == "notify-reload"
    assert service.state == "active"
    assert service.main_pid == service.status()["pid"]
    with service.load() as load:
        wait_until("a thousand echoes", lambda: load.report().received > 1000)
        report = load.stop()
    assert report.is_whole, report
    assert service.status()["drops"] == {}


def test_service_has_the_rights_it_needs_and_no_other(service: Service) -> None:
    machine = service.machine
    bind_service = 1 << 10
    for pid in machine.processes():
        text = machine.do("cat", f"/proc/{pid}/status")
        fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        assert set(fields["Uid"].split()) == {machine.do("id", "-u", "toppy-gw")}
        assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == bind_service
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
    assert machine.do("stat", "--format=%a %U", "/run/toppy-gw") == "700 toppy-gw"


def test_audit_log_is_on_and_only_the_service_may_read_it(service: Service) -> None:
    machine = service.machine
    assert machine.do("stat", "--format=%a %U", "/var/lib/toppy-gw") == "700 toppy-gw"
    log = "/var/lib/toppy-gw/audit.jsonl"
    assert machine.do("stat", "--format=%a %U", log) == "600 toppy-gw"
    assert service.status()["audit"]["path"] == log
    # root, who has no $STATE_DIRECTORY
    before = json.loads(machine.do("toppy-gw", "audit", "verify", "--json"))
    assert before["ok"]
    main_pid = service.main_pid
    machine.do("kill", "-KILL", str(main_pid))
    service.wait_for_new_control_plane(main_pid)
    machine.do("systemctl", "restart", UNIT)
    after = json.loads(machine.do("toppy-gw", "audit", "verify", "--json"))
    assert after["ok"]
    assert after["entries"] > before["entries"]


def test_documentation_has_the_exposure_that_systemd_measures(service: Service) -> None:
    said = service.machine.do("systemd-analyze", "security", "--no-pager", UNIT)
    score = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert score is not None
    assert f"`{score[1]}`" in (PROJECT / "docs" / "systemd.md").read_text()


def test_reload_under_load_loses_nothing(service: Service) -> None:
    machine = service.machine
    main_pid, generation = service.main_pid, service.status()["generation"]
    with service.load() as load:
        machine.do("systemctl", "reload", UNIT)
        # it returns when the new generation serves, and there is only one
        assert service.status()["generation"] == generation + 1
        service.wait_for_only(generation + 1)
        machine.do("systemctl", "kill", "--kill-whom=main", "--signal=HUP", UNIT)
        service.wait_for_only(generation + 2)
        report = load.stop()
    assert report.is_whole, report
    assert service.state == "active"
    assert service.main_pid == main_pid
    assert service.status()["worker_deaths"] == 0


def test_reload_of_a_broken_configuration_fails_visibly_and_the_service_stays_active(
    service: Service,
) -> None:
    machine, workers = service.machine, service.worker_pids()
    with service.load() as load:
        with service.changed_config("workers = 2", "workers = 2\nwrong = 1"):
            done = machine.run("systemctl", "reload", UNIT)
        assert done.returncode != 0
        status = machine.run("systemctl", "status", "--no-pager", UNIT).stdout
        assert "active (running)" in status
        assert "reload failed" in machine.property("StatusText")
        assert "wrong: unknown key" in status
        assert service.state == "active"
        assert service.worker_pids() == workers
        report = load.stop()
    assert report.is_whole, report
    machine.do("systemctl", "reload", UNIT)


def test_killed_worker_is_replaced_and_clients_come_back(service: Service) -> None:
    main_pid, before = service.main_pid, service.status()
    deaths = before["worker_deaths"]
    with service.load() as load:
        wait_until("the tunnel", lambda: any(w["tunnels"] for w in service.status()["workers"]))
        (busy,) = (w for w in service.status()["workers"] if w["tunnels"])
        service.machine.do("kill", "-KILL", str(busy["pid"]))
        wait_until("the death", lambda: bool(service.status()["worker_deaths"] == deaths + 1))
        received = load.report().received
        wait_until("echoes again", lambda: load.report().received > received + 100)
        report = load.stop()
    assert (report.duplicated, report.reordered) == (0, 0)
    assert service.main_pid == main_pid
    after = service.worker_pids()
    pids = {w["name"]: w["pid"] for w in before["workers"]}
    assert {name for name in after if after[name] != pids.get(name)} == {busy["name"]}
    assert service.relays()


def test_killed_control_plane_is_replaced_by_one_that_takes_over_the_workers(
    service: Service,
) -> None:
    machine = service.machine
    main_pid, workers = service.main_pid, service.worker_pids()
    generation = service.status()["generation"]
    with service.load() as load:
        machine.do("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)
        service.wait_for_new_control_plane(main_pid)
        assert service.worker_pids() == workers
        assert service.status()["generation"] == generation
        assert service.relays()
        # and it is master of what it took over
        machine.do("systemctl", "reload", UNIT)
        service.wait_for_only(generation + 1)
        report = load.stop()
    assert report.is_whole, report
    assert set(machine.processes()) == {service.main_pid, *service.worker_pids().values()}


def test_tunnel_that_is_asked_for_without_a_control_plane_opens_with_the_next_one(
    service: Service,
) -> None:
    main_pid = service.main_pid
    service.machine.do("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)
    assert service.relays()
    service.wait_for_new_control_plane(main_pid)


def test_control_plane_that_hangs_is_ended_by_the_watchdog_and_workers_relay_on(
    service: Service,
) -> None:
    machine = service.machine
    with service.dropin(A_WATCHDOG):
        service.start()
        main_pid, workers = service.main_pid, service.worker_pids()
        with service.load() as load:
            machine.do("kill", "-STOP", str(main_pid))
            service.wait_for_new_control_plane(main_pid)
            assert "Watchdog timeout" in machine.journal()
            assert service.worker_pids() == workers
            assert service.relays()
            report = load.stop()
        assert report.is_whole, report


def test_restart_starts_everything_anew_and_clients_come_back(service: Service) -> None:
    machine = service.machine
    main_pid, workers = service.main_pid, service.worker_pids()
    with service.load() as load:
        machine.do("systemctl", "restart", UNIT)
        assert service.main_pid != main_pid
        assert not set(service.worker_pids().values()) & set(workers.values())
        received = load.report().received
        wait_until("echoes again", lambda: load.report().received > received + 100)
        load.stop()
    assert service.relays()


def test_stop_leaves_nothing(service: Service) -> None:
    machine = service.machine
    with service.load():
        service.stop()
        assert service.state == "inactive"
        assert machine.property("Result") == "success"
        assert machine.property("ExecMainStatus") == "0"
        assert machine.processes() == {}
        assert machine.run("pgrep", "--uid", "toppy-gw").stdout == ""
        assert machine.property("NFileDescriptorStore") == "0"
        assert not service.path("run/toppy-gw").exists()
        assert machine.do("ss", "--no-header", "--udp", "--listening", "sport", "=", ":443") == ""
        service.start()
    assert service.relays()


def test_workers_of_a_control_plane_that_had_to_be_killed_are_ended(service: Service) -> None:
    # a main process and another one, both deaf to SIGTERM
    deaf = 'trap "" TERM; sleep 300 & while :; do sleep 1; done'
    text = f"[Service]\nType=exec\nTimeoutStopSec=3s\nExecStart=\nExecStart=/bin/sh -c '{deaf}'\n"
    machine = service.machine
    with service.dropin(text):
        machine.do("systemctl", "start", UNIT)
        wait_until("two processes", lambda: len(machine.processes()) > 1)
        machine.run("systemctl", "stop", UNIT)
        assert machine.property("Result") == "timeout"
        assert machine.processes() == {}
        machine.do("systemctl", "reset-failed", UNIT)


def test_installing_and_upgrading_under_load_loses_nothing(service: Service) -> None:
    machine, config = service.machine, service.path(CONFIG).read_text()
    main_pid, generation = service.main_pid, service.status()["generation"]
    with service.load() as load:
        assert "toppy-gw upgrade" in install(machine)
        assert service.path(CONFIG).read_text() == config
        machine.do("toppy-gw", "upgrade")
        service.wait_for_only(generation + 1)
        assert service.main_pid == main_pid
        assert service.state == "active"
        report = load.stop()
    assert report.is_whole, report
    # the watchdog and the store of descriptors still know it
    assert int(machine.property("NFileDescriptorStore")) > 0
    machine.do("systemctl", "reload", UNIT)


def test_older_systemd_reloads_through_the_drop_in(service: Service) -> None:
    machine = service.machine
    with service.dropin(DROPIN.read_text()):
        service.start()
        assert machine.property("Type") == "notify"
        main_pid = service.main_pid
        with service.load() as load:
            machine.do("systemctl", "reload", UNIT)
            assert service.status()["generation"] == 2
            with service.changed_config("workers = 2", "workers = 2\nwrong = 1"):
                done = machine.run("systemctl", "reload", UNIT)
            assert done.returncode != 0
            assert "wrong: unknown key" in machine.journal()
            assert (service.state, service.main_pid) == ("active", main_pid)
            report = load.stop()
        assert report.is_whole, report


def test_secrets_can_come_as_credentials(service: Service) -> None:
    machine = service.machine
    names = ("token", "server-key.pem")
    kept = "/run/credentials/toppy-gw.service"
    credentials = "".join(f"LoadCredential={name}:/etc/toppy/{name}\n" for name in names)
    assert credentials.splitlines() == [
        line.removeprefix("#")
        for line in (PROJECT / "systemd" / UNIT).read_text().splitlines()
        if line.startswith("#LoadCredential=")
    ]
    paths = [f"/etc/toppy/{name}" for name in names]
    with (
        service.dropin(f"[Service]\n{credentials}"),
        service.changed_config('token_file = "token"', f'token_file = "{kept}/token"'),
        service.changed_config('"server-key.pem"', f'"{kept}/server-key.pem"'),
    ):
        machine.do("chown", "root", *paths)
        try:
            service.start()
            assert service.relays()
            machine.do("systemctl", "reload", UNIT)
        finally:
            machine.do("chown", "toppy-gw", *paths)


def test_log_lines_in_the_journal_are_json(service: Service) -> None:
    said = [line for line in service.machine.journal().splitlines() if "gateway serves" in line]
    assert json.loads(said[-1])["listen"] == ["127.0.0.1:443"]


def test_main_process_is_the_only_one_that_systemd_signals(service: Service) -> None:
    assert service.machine.property("KillMode") == "process"
    # a reload is asked for once, by ExecReload
    assert int(service.machine.property("ReloadSignal")) == signal.SIGCONT
