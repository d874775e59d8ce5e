"""Bounds on the memory and the work that reading a file may take, known before they are taken."""

from ibau_jax.errors import CheckpointError

# docs/security.md promises 64 MiB + 8 x the file's size. What is charged is what objects take; the rest is for the
# stack and the memo (8 bytes a step), for what the standard library copies while it works, and for what is made of
# the tree afterwards.
BASE, FACTOR = 40 * 2**20, 6
STEPS, BYTES_A_STEP = 1_400_000, 4  # an honest pickle takes five bytes and more a step
PROBES, PROBES_A_BYTE = 2 * 10**8, 20


class Budget:
    """What reading a file of `file_size` bytes may still take.

    An honest file holds what it describes, so some multiple of its size is enough; a 1 kB file can't ask for 100 GB.

    Attributes:
        left: bytes of memory. Each object is charged once, by what it takes.
        steps: opcodes of its pickles.
        probes: look-ups in the tables of dicts and sets whose keys a file could choose to collide.
    """

    def __init__(self, file_size: int) -> None:
        self.limit = BASE + FACTOR * file_size
        self.left = self.limit
        self.steps = STEPS + file_size // BYTES_A_STEP
        self.probes = PROBES + PROBES_A_BYTE * file_size

    def require(self, nbytes: int) -> None:
        """Raises CheckpointError if less than `nbytes` are left; they are not charged, since they are given back."""
        if nbytes > self.left:
            raise CheckpointError(
                f"the file asks for more than {self.limit / 2**20:.0f} MiB of memory, "
                "which its size does not justify: refused"
            )

    def take(self, nbytes: int) -> None:
        """Charges `nbytes`.

        Raises:
            CheckpointError: more than is left.
        """
        if nbytes > self.left:
            self.require(nbytes)
        self.left -= nbytes

    def step(self, count: int) -> None:
        """Charges `count` opcodes, likewise."""
        self.steps -= count
        if self.steps < 0:
            raise CheckpointError("the pickle takes more steps than the file's size justifies: refused")

    def probe(self, count: int) -> None:
        """Charges `count` look-ups of keys, likewise."""
        self.probes -= count
        if self.probes < 0:
            raise CheckpointError("too many of the dicts' keys are numbers in no order: refused")
