"""An inbox under test: real folders and files, a fake clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pydicom

import mura_batch.inbox
from mura_batch.config import Settings
from mura_batch.custody import Candidate, FoundFile
from mura_batch.inbox import Inbox
from mura_batch.study import Kind

SAMPLES = Path(mura_batch.inbox.__file__).parent / "samples"
PNG = (SAMPLES / "elbow_lateral.png").read_bytes()
DICOM = SAMPLES / "DICOM" / "IM0001"


class Box:
    """An inbox under test; its clock goes on when told to."""

    def __init__(
        self, home: Path, *, seen: Callable[[FoundFile], bool] | None = None, **changes: object
    ) -> None:
        self.settings = Settings(home=home, **{"settle_max_seconds": 60.0, **changes})
        self.root = self.settings.inbox_dir
        self.root.mkdir(parents=True, exist_ok=True)
        self.now = 100.0
        self.inbox = Inbox(self.settings, clock=lambda: self.now, seen=seen)

    def put(self, name: str, content: bytes = PNG) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def put_dicom(self, name: str, uid: str) -> Path:
        dataset = pydicom.dcmread(DICOM)
        dataset.StudyInstanceUID = uid
        path = self.put(name)
        dataset.save_as(path)
        return path

    def scan(self, after: float = 0.0, named: set[str] | None = None) -> list[Candidate]:
        self.now += after
        return self.inbox.scan(named)

    def units(self) -> dict[tuple[Kind, str], list[str]]:
        """Everything, after it has settled: unit to file names."""
        self.scan()
        return {(c.kind, c.key): [f.name for f in c.files] for c in self.scan(after=2)}
