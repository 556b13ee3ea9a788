"""Whether a TUN device can be had, on systems that are played here."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from toppy.system.tun_probe import (
    LinuxTunProbe,
    MacTunProbe,
    OtherTunProbe,
    WindowsTunProbe,
    _LoadedWintun,
    load_wintun,
    tun_probe,
)

PROGRAM, WORKING = Path("/program"), Path("/working")


# Linux


def test_a_device_that_can_be_opened_is_usable(tmp_path: Path) -> None:
    device = tmp_path / "tun"
    device.touch()
    answer = LinuxTunProbe(str(device)).check()
    assert answer.is_usable
    assert str(device) in answer.summary


@pytest.mark.parametrize(("name", "advice"), [("none", "modprobe tun"), ("file/x", "root")])
def test_a_device_that_cannot_be_opened_says_what_to_do(
    tmp_path: Path, name: str, advice: str
) -> None:
    (tmp_path / "file").touch()
    answer = LinuxTunProbe(str(tmp_path / name)).check()
    assert not answer.is_usable
    assert advice in answer.remedy


# macOS


def test_a_utun_socket_that_opens_is_usable() -> None:
    answer = MacTunProbe(lambda: "utun7").check()
    assert answer.is_usable
    assert "utun7" in answer.summary


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EPERM, "sudo"), (errno.EACCES, "sudo"), (errno.EBUSY, "another VPN")],
)
def test_a_utun_socket_that_does_not_open_says_what_to_do(number: int, advice: str) -> None:
    def refuse() -> str:
        raise OSError(number, "no")

    answer = MacTunProbe(refuse).check()
    assert not answer.is_usable
    assert advice in answer.remedy


# Windows


@dataclass
class FakeWintun:
    """Adapters by name, and what was done with them."""

    adapters: set[str] = field(default_factory=set)
    may_create: bool = True
    made: dict[int, str] = field(default_factory=dict)
    open_handles: set[int] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    def _handle(self) -> int:
        handle = len(self.calls) + 100
        self.open_handles.add(handle)
        return handle

    def open_adapter(self, name: str) -> int:
        self.calls.append(f"open {name}")
        if name not in self.adapters:
            raise OSError(errno.ENOENT, "not found")
        return self._handle()

    def create_adapter(self, name: str, tunnel_type: str) -> int:
        self.calls.append(f"create {name} {tunnel_type}")
        if not self.may_create:
            raise OSError(errno.EACCES, "access is denied")
        self.adapters.add(name)
        handle = self._handle()
        self.made[handle] = name
        return handle

    def close_adapter(self, adapter: int) -> None:
        self.open_handles.remove(adapter)
        if adapter in self.made:
            self.adapters.remove(self.made[adapter])


def windows(
    wintun: FakeWintun, *there: Path, load: Callable[[Path], Any] | None = None, **environ: str
) -> WindowsTunProbe:
    return WindowsTunProbe(
        environ, PROGRAM, WORKING, load or (lambda _: wintun), lambda path: path in there
    )


def test_an_adapter_that_is_there_is_opened_and_left() -> None:
    wintun = FakeWintun(adapters={"toppy-doctor"})
    answer = windows(wintun, PROGRAM / "wintun.dll").check()
    assert answer.is_usable
    assert wintun.calls == ["open toppy-doctor"]
    assert wintun.adapters == {"toppy-doctor"}
    assert not wintun.open_handles


def test_an_adapter_that_is_not_there_is_made_and_removed() -> None:
    wintun = FakeWintun()
    answer = windows(wintun, PROGRAM / "wintun.dll").check()
    assert answer.is_usable
    assert wintun.calls == ["open toppy-doctor", "create toppy-doctor toppy"]
    assert not wintun.adapters
    assert not wintun.open_handles


def test_the_adapters_name_can_be_chosen() -> None:
    wintun = FakeWintun()
    windows(wintun, PROGRAM / "wintun.dll", TOPPY_WINTUN_ADAPTER="mine").check()
    assert wintun.calls == ["open mine", "create mine toppy"]


def test_an_adapter_that_may_not_be_made_asks_for_the_administrator() -> None:
    answer = windows(FakeWintun(may_create=False), PROGRAM / "wintun.dll").check()
    assert not answer.is_usable
    assert "administrator" in answer.remedy


def test_a_missing_library_says_where_to_get_it_and_how_to_name_it() -> None:
    answer = windows(FakeWintun()).check()
    assert not answer.is_usable
    for part in ("wintun.net", "TOPPY_WINTUN_DIR", "TOPPY_WINTUN_DLL"):
        assert part in answer.remedy


def test_a_library_for_another_processor_is_told() -> None:
    def load(path: Path) -> Any:
        raise OSError(errno.ENOEXEC, "not a valid Win32 application")

    answer = windows(FakeWintun(), PROGRAM / "wintun.dll", load=load).check()
    assert not answer.is_usable
    assert "processor" in answer.remedy


@pytest.mark.parametrize(
    ("environ", "there", "expected"),
    [
        ({}, [PROGRAM, WORKING], PROGRAM),
        ({}, [WORKING], WORKING),
        ({"TOPPY_WINTUN_DIR": "/dir"}, [Path("/dir"), PROGRAM], Path("/dir")),
        ({"TOPPY_WINTUN_DIR": "/dir"}, [PROGRAM, WORKING], PROGRAM),
    ],
)
def test_folders_are_searched_in_order(
    environ: dict[str, str], there: list[Path], expected: Path
) -> None:
    loaded: list[Path] = []

    def load(path: Path) -> FakeWintun:
        loaded.append(path)
        return FakeWintun()

    files = [folder / "wintun.dll" for folder in there]
    windows(FakeWintun(), *files, load=load, **environ).check()
    assert loaded == [expected / "wintun.dll"]


def test_a_file_that_is_named_comes_first() -> None:
    named = Path("/named/w.dll")
    probe = windows(FakeWintun(), TOPPY_WINTUN_DLL=str(named), TOPPY_WINTUN_DIR="/dir")
    assert probe.candidates()[:2] == [named, Path("/dir/wintun.dll")]


@pytest.mark.parametrize(
    ("processor", "folder"), [("AMD64", "amd64"), ("ARM64", "arm64"), ("x86", "x86")]
)
@pytest.mark.parametrize("zip_root", [Path("wintun"), Path()])
def test_wintuns_unpacked_zip_is_understood(processor: str, folder: str, zip_root: Path) -> None:
    inside = Path("/dir") / zip_root / "bin" / folder / "wintun.dll"
    wintun = FakeWintun()
    probe = windows(wintun, inside, TOPPY_WINTUN_DIR="/dir", PROCESSOR_ARCHITECTURE=processor)
    assert str(inside) in probe.check().summary


class FakeFunction:
    """As ctypes has them."""

    def __init__(self, result: int | None) -> None:
        self.result = result
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> int | None:
        self.calls.append(arguments)
        return self.result


@dataclass
class FakeLibrary:
    WintunOpenAdapter: FakeFunction
    WintunCreateAdapter: FakeFunction
    WintunCloseAdapter: FakeFunction


def test_the_library_is_called_as_its_header_says() -> None:
    library = FakeLibrary(FakeFunction(None), FakeFunction(7), FakeFunction(None))
    wintun = _LoadedWintun(library, lambda: OSError(errno.ENOENT, "none"))
    with pytest.raises(OSError, match="none"):
        wintun.open_adapter("toppy-doctor")
    wintun.close_adapter(wintun.create_adapter("toppy-doctor", "toppy"))
    assert library.WintunCreateAdapter.calls == [("toppy-doctor", "toppy", None)]
    assert library.WintunCloseAdapter.calls == [(7,)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has the loader")
def test_elsewhere_no_wintun_can_be_loaded() -> None:
    with pytest.raises(OSError, match="no Windows"):
        load_wintun(Path("wintun.dll"))


# which one


@pytest.mark.parametrize(
    ("platform", "kind"),
    [
        ("linux", LinuxTunProbe),
        ("darwin", MacTunProbe),
        ("win32", WindowsTunProbe),
        ("freebsd14", OtherTunProbe),
    ],
)
def test_each_system_has_its_own_probe(platform: str, kind: type) -> None:
    assert isinstance(tun_probe({}, platform), kind)


def test_a_system_without_a_known_tun_says_so() -> None:
    answer = OtherTunProbe("freebsd14").check()
    assert not answer.is_usable
    assert "freebsd14" in answer.summary
