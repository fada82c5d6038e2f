"""Which files belong to a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path


def model_file(directory: Path, name: str | Path) -> Path:
    """``directory/name``, whether it exists or not.

    ValueError where that is a link out of the directory: what it leads to would be read, and copied into an export, as
    if it had come with the model. The hub's own cache is let through, whose snapshots/REVISION/FILE are links to
    blobs/DIGEST next to it.
    """
    path = Path(directory) / name
    try:
        folder, target = Path(directory).resolve(), path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        raise ValueError(f"{path}: expected a file, got a link that leads nowhere; fetch the file") from None
    if target.is_relative_to(folder):
        return path
    if folder.parent.name == "snapshots" and target.is_relative_to((folder.parent.parent / "blobs").resolve()):
        return path
    raise ValueError(
        f"{path}: expected a file of that directory, got a link to {target}, outside of it; if that is meant, make a "
        "directory without links: cp -rL"
    )
