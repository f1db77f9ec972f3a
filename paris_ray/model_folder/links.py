"""Links in a folder from a stranger."""

from paris_ray.errors import BundleError
from paris_ray.folders import Folder


def check_links(folder: Folder) -> None:
    """Refuse what a hostile archive may hold in a local folder: links that leave it, pipes.

    Raises:
        BundleError: naming the path.
    """
    root = folder.local_path.resolve()
    for path in root.rglob("*"):
        if not path.is_file() and not path.is_dir():
            raise BundleError(f"{path} is neither a file nor a folder")
        if not path.resolve().is_relative_to(root):
            raise BundleError(
                f"{path} is a link that leaves the folder: copy the folder with cp -rL, "
                "or download it with local_dir=..."
            )
