"""A private PostgreSQL server for the tests: its own folder, a Unix socket and no port."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import psycopg
import pytest


def database(name: str, template: str = "template0") -> str:
    """Make a database in the one server of this test run and return its URL."""
    programs = _binaries()
    if programs is None:
        pytest.skip("PostgreSQL (initdb, pg_ctl) is not installed: apt-get install postgresql")
    home = _server(programs)
    with psycopg.connect(host=str(home), user="mura", dbname="postgres", autocommit=True) as admin:
        admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'.encode())
    return f"postgresql://mura@/{name}?host={home}"


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "pg_ctl").exists()), None)


@cache
def _server(programs: Path) -> Path:
    """Start a server that ends with this process; return the folder of its socket."""
    user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    home = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path has to be short
    if user:
        shutil.chown(home, user)

    def call(program: str, *arguments: str) -> None:
        command = [programs / program, "-D", home / "data", *arguments]
        subprocess.run(command, check=True, user=user, cwd=home, stdout=subprocess.DEVNULL)

    def stop() -> None:
        call("pg_ctl", "-w", "-m", "immediate", "stop")
        shutil.rmtree(home)

    call("initdb", "-U", "mura", "-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C.UTF-8")
    options = f"-k {home} -c listen_addresses= -c fsync=off"
    call("pg_ctl", "-w", "-l", str(home / "server.log"), "-o", options, "start")
    atexit.register(stop)
    return home
