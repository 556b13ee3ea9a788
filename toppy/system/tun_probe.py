"""Whether this host lets this user have a TUN device, found out by asking for one (T-086, T-087).

Linux: ``/dev/net/tun`` is opened. macOS: a utun control socket is opened and closed, which makes
and removes an interface. Windows: Wintun is loaded and its adapter opened, or made and removed.
Nothing is left behind. The systems' own calls are behind small interfaces, so that what is done
with them is tested everywhere; on macOS and Windows themselves it has not been run.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

LINUX_DEVICE: Final = "/dev/net/tun"
ADAPTER_NAME: Final = "toppy-doctor"
WINTUN_DLL: Final = "wintun.dll"
_TUNNEL_TYPE: Final = "toppy"
_UTUN_CONTROL: Final = b"com.apple.net.utun_control"
_CTLIOCGINFO: Final = 0xC0644E03
"""_IOWR('N', 3, struct ctl_info) of <sys/kern_control.h>; the struct has 100 bytes."""
_WINTUN_FOLDERS: Final = {"AMD64": "amd64", "ARM64": "arm64", "x86": "x86", "ARM": "arm"}
"""PROCESSOR_ARCHITECTURE, and the folder below ``wintun/bin`` of Wintun's zip file."""


@dataclass(frozen=True, slots=True)
class TunAnswer:
    """Whether a TUN device can be had; else why not, and what to do."""

    is_usable: bool
    summary: str
    remedy: str = ""


class TunProbe(Protocol):
    """One system's way to find out."""

    def check(self) -> TunAnswer:
        """Asks the system; may take a second on Windows."""
        ...


def tun_probe(environ: Mapping[str, str], platform: str = sys.platform) -> TunProbe:
    """The one for this system."""
    if platform.startswith("linux"):
        return LinuxTunProbe()
    if platform == "darwin":
        return MacTunProbe(_open_utun)
    if platform == "win32":
        return WindowsTunProbe(
            environ, Path(sys.executable).parent, Path.cwd(), load_wintun, Path.is_file
        )
    return OtherTunProbe(platform)


class OtherTunProbe:
    """A system that toppy knows no TUN device of."""

    def __init__(self, platform: str) -> None:
        self._platform = platform

    def check(self) -> TunAnswer:
        return TunAnswer(False, f"not checked: toppy knows no TUN device of {self._platform}")


class LinuxTunProbe:
    """Opens the device for reading and writing; that alone makes no interface."""

    def __init__(self, device: str = LINUX_DEVICE) -> None:
        self._device = device

    def check(self) -> TunAnswer:
        try:
            os.close(os.open(self._device, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            missing = error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
            return TunAnswer(
                False,
                f"{self._device}: {error.strerror}",
                "run `modprobe tun`"
                if missing
                else "run as root, or give this user CAP_NET_ADMIN and access to the device",
            )
        return TunAnswer(True, f"{self._device} can be opened")


class MacTunProbe:
    """Opens a utun control socket, as any program that wants an interface does."""

    def __init__(self, open_utun: Callable[[], str]) -> None:
        """``open_utun`` makes an interface, removes it and returns its name, or raises
        ``OSError``.
        """
        self._open_utun = open_utun

    def check(self) -> TunAnswer:
        try:
            name = self._open_utun()
        except OSError as error:
            is_forbidden = error.errno in (errno.EPERM, errno.EACCES)
            return TunAnswer(
                False,
                f"a utun control socket: {error.strerror or error}",
                "run with sudo: macOS gives utun interfaces to root only"
                if is_forbidden
                else "look for utun in `ifconfig`; another VPN may hold what there is",
            )
        return TunAnswer(True, f"a utun control socket can be opened ({name} was there for it)")


def _open_utun() -> str:  # pragma: no cover  # macOS only
    family: Any = getattr(socket, "AF_SYSTEM", 32)
    protocol: Any = getattr(socket, "SYSPROTO_CONTROL", 2)
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as sock:
        import fcntl  # noqa: PLC0415  # not there on Windows

        info = fcntl.ioctl(sock, _CTLIOCGINFO, struct.pack("I96s", 0, _UTUN_CONTROL))
        (control_id,) = struct.unpack_from("I", info)
        address: Any = (control_id, 0)
        sock.connect(address)  # unit 0: the next one that is free
        option = sock.getsockopt(protocol, 2, 64)  # UTUN_OPT_IFNAME
        return option.rstrip(b"\0").decode("ascii", "replace")


class Wintun(Protocol):
    """What is used of ``wintun.dll`` (its header, version 0.14). A handle is a number, 0: none."""

    def open_adapter(self, name: str) -> int:
        """Raises ``OSError`` when there is no such adapter, or it may not be used."""
        ...

    def create_adapter(self, name: str, tunnel_type: str) -> int:
        """Raises ``OSError``."""
        ...

    def close_adapter(self, adapter: int) -> None:
        """Let it go; one that was created here is removed with that."""
        ...


class WindowsTunProbe:
    """Finds Wintun, and opens its adapter; where there is none yet, makes and removes it."""

    def __init__(
        self,
        environ: Mapping[str, str],
        program_folder: Path,
        working_folder: Path,
        load: Callable[[Path], Wintun],
        is_file: Callable[[Path], bool],
    ) -> None:
        """``load`` raises ``OSError`` for a file that is no Wintun for this processor."""
        self._environ = environ
        self._program_folder = program_folder
        self._working_folder = working_folder
        self._load = load
        self._is_file = is_file

    @property
    def adapter_name(self) -> str:
        """``TOPPY_WINTUN_ADAPTER``, or ``toppy-doctor``."""
        return self._environ.get("TOPPY_WINTUN_ADAPTER") or ADAPTER_NAME

    def candidates(self) -> list[Path]:
        """Where the library may be, in order: ``TOPPY_WINTUN_DLL``, ``TOPPY_WINTUN_DIR``, beside
        the program, the working folder. Folders may also be Wintun's zip file, unpacked.
        """
        folders = [self._program_folder, self._working_folder]
        if self._environ.get("TOPPY_WINTUN_DIR"):
            folders.insert(0, Path(self._environ["TOPPY_WINTUN_DIR"]))
        named = self._environ.get("TOPPY_WINTUN_DLL")
        architecture = self._environ.get("PROCESSOR_ARCHITECTURE", "AMD64")
        inside = _WINTUN_FOLDERS.get(architecture, architecture.lower())
        files = [Path(named)] if named else []
        return files + [
            folder / path / WINTUN_DLL
            for folder in folders
            for path in (Path(), Path("bin", inside), Path("wintun", "bin", inside))
        ]

    def check(self) -> TunAnswer:
        found = next((path for path in self.candidates() if self._is_file(path)), None)
        if found is None:
            return TunAnswer(
                False,
                f"{WINTUN_DLL} is not there (looked for {self.candidates()[0]} and others)",
                "get it from wintun.net, and name its folder in TOPPY_WINTUN_DIR or the file in "
                "TOPPY_WINTUN_DLL",
            )
        try:
            wintun = self._load(found)
        except OSError as error:
            return TunAnswer(
                False,
                f"{found} cannot be loaded: {error.strerror or error}",
                "take the file for this processor from Wintun's zip (bin\\amd64, bin\\arm64, …)",
            )
        return self._use_adapter(wintun, found)

    def _use_adapter(self, wintun: Wintun, library: Path) -> TunAnswer:
        name = self.adapter_name
        try:
            wintun.close_adapter(wintun.open_adapter(name))
        except OSError:
            pass  # there is none yet
        else:
            return TunAnswer(True, f"{library} works: the adapter {name!r} can be opened")
        try:
            wintun.close_adapter(wintun.create_adapter(name, _TUNNEL_TYPE))
        except OSError as error:
            return TunAnswer(
                False,
                f"{library}: the adapter {name!r} cannot be made: {error.strerror or error}",
                "run as administrator",
            )
        return TunAnswer(True, f"{library} works: the adapter {name!r} was made and removed again")


class _LoadedWintun:
    """``Wintun`` by way of ctypes."""

    def __init__(self, library: Any, last_error: Callable[[], OSError]) -> None:
        self._last_error = last_error
        self._open = library.WintunOpenAdapter
        self._create = library.WintunCreateAdapter
        self._close = library.WintunCloseAdapter
        self._open.argtypes = [ctypes.c_wchar_p]
        self._create.argtypes = [ctypes.c_wchar_p, ctypes.c_wchar_p, ctypes.c_void_p]
        self._close.argtypes = [ctypes.c_void_p]
        self._open.restype = self._create.restype = ctypes.c_void_p
        self._close.restype = None

    def open_adapter(self, name: str) -> int:
        return self._handle(self._open(name))

    def create_adapter(self, name: str, tunnel_type: str) -> int:
        return self._handle(self._create(name, tunnel_type, None))

    def close_adapter(self, adapter: int) -> None:
        self._close(adapter)

    def _handle(self, value: int | None) -> int:
        if not value:
            raise self._last_error()
        return value


def load_wintun(path: Path) -> Wintun:
    """Wintun from that file. Raises ``OSError``."""
    module: Any = ctypes  # its Windows half is not there elsewhere
    if not hasattr(module, "WinDLL"):
        raise OSError(errno.ENOEXEC, "this is no Windows")
    try:
        library = module.WinDLL(str(path), use_last_error=True)
        return _LoadedWintun(library, lambda: module.WinError(module.get_last_error()))
    except AttributeError:
        raise OSError(errno.ENOEXEC, "it has not the functions of Wintun") from None
