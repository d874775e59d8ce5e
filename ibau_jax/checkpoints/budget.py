"""A bound on the memory that reading a file may take, known before it is taken."""

from ibau_jax.errors import CheckpointError

FACTOR = 8  # a tensor may be charged as a tensor and as a parameter, and be shared
BASE = 64 * 2**20


class Budget:
    """Bytes that reading a file of `file_size` bytes may still take.

    An honest file holds what it describes, so some multiple of its size is enough; a 1 kB file can't ask for 100 GB.
    """

    def __init__(self, file_size: int) -> None:
        self.limit = BASE + FACTOR * file_size
        self.left = self.limit

    def take(self, nbytes: int) -> None:
        """Charges `nbytes`.

        Raises:
            CheckpointError: more than is left.
        """
        if nbytes > self.left:
            raise CheckpointError(
                f"the file asks for more than {self.limit / 2**20:.0f} MiB of memory, "
                "which its size does not justify: refused"
            )
        self.left -= nbytes
